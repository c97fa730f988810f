"""What goes into an index: the photographs of a folder, a table, a shard set or a benchmark's database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.reading import read_regular
from data_pipeline.exif import CameraFacts, read_exif
from data_pipeline.photographs import list_photographs
from data_pipeline.positions import Positions, from_lat_lon, from_metres, from_utm_names
from eval.features import digest, files_digest
from eval.index.images import unknown_positions

_COLUMNS = "path and, where it is known, lat and lon, or east and north (metres) and zone"
LAST_YEAR, MONTHS = 9999, 12


@dataclass(frozen=True)
class PhotoList:
    """N photographs in order: their names below `root`, positions, how to read one, and what was left out of the list.

    `identity` changes when a photograph does. `camera(i)` is what EXIF says of photograph i, asked for those without a
    position; None where there is nothing to ask. `when` is known of shard sets, whose photographs carry no EXIF.
    """

    root: str
    names: list[str]
    positions: Positions
    identity: str
    read: Callable[[int], bytes]
    camera: Callable[[int], CameraFacts] | None = None
    when: NDArray[np.datetime64] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def part(self, numbers: Sequence[int]) -> PhotoList:
        """Some of the photographs, in this order."""
        at = np.asarray(numbers, dtype=np.int64)
        of, read, camera = self.positions, self.read, self.camera
        return PhotoList(
            root=self.root,
            names=[self.names[i] for i in numbers],
            positions=Positions(of.east[at], of.north[at], of.zone[at], of.lat[at], of.lon[at], of.in_metres),
            identity=digest([self.identity, list(map(int, numbers))]),
            read=lambda i: read(int(at[i])),
            camera=None if camera is None else lambda i: camera(int(at[i])),
            when=None if self.when is None else self.when[at],
            notes=self.notes,
        )


def list_source(source: str, data_root: Path = Path("data"), *, retry_s: float = 120.0) -> PhotoList:
    """The photographs that `source` names, each kind told by what is there.

    A folder (or URL) with `index.parquet` is a shard set, another folder one of photographs (positions from names in
    the UTM convention, else from EXIF), a `.csv` or `.parquet` file a table, anything else a benchmark of the
    catalogue, of which the database is taken. Reads of a shard set that fail remotely are tried again for `retry_s`
    seconds. Raises ValueError or OSError with what would be right.
    """
    from data_pipeline.storage import is_remote

    path = Path(source)
    if is_remote(source) or (path / "index.parquet").is_file():
        return of_shards(source, retry_s)
    if path.is_dir():
        return of_folder(path)
    if path.suffix in (".csv", ".parquet") or path.is_file():
        return of_table(path)
    if "/" in source and source.split("/")[0] in ("", ".", ".."):
        raise FileNotFoundError(f"{source}: no such folder; expected photographs, a table, a shard set or a benchmark")
    return of_benchmark(source, data_root)


def of_folder(folder: Path) -> PhotoList:
    """The photographs below a folder. Raises FileNotFoundError where there is none."""
    found = list_photographs(folder)
    if not found.names:
        raise FileNotFoundError(f"{folder}: no photograph in it {found.note()}".strip())
    return of_files(folder, found.names, notes=tuple(filter(None, [found.note()])))


def of_files(
    root: Path, names: list[str], positions: Positions | None = None, notes: tuple[str, ...] = ()
) -> PhotoList:
    """Photographs by their names below a folder; positions from their names or EXIF unless given."""
    paths = [root / name for name in names]
    if positions is None and all(path.name.startswith("@") for path in paths):
        positions = from_utm_names(names)
    given = positions if positions is not None else unknown_positions(len(names))
    return PhotoList(
        root=str(root.absolute()),
        names=names,
        positions=given,
        identity=files_digest(paths),
        read=lambda i: read_regular(paths[i]),
        camera=lambda i: read_exif(paths[i]),
        notes=(*notes, *given.notes),
    )


def of_table(file: Path) -> PhotoList:
    """The photographs that a CSV or Parquet table lists, relative to the table. Raises ValueError naming the row."""
    from data_pipeline.tables import read_table_of_rows

    table = read_table_of_rows(file)
    known = {"latitude": "lat", "longitude": "lon", "lng": "lon", "easting": "east", "northing": "north"}
    columns = {known.get(name, name): name for name in table.columns}
    if "path" not in columns:
        raise ValueError(f"{file}: no column path; found {', '.join(table.columns)}; expected {_COLUMNS}")
    names = table.text("path").to_pylist()
    for name, line in zip(names, table.lines.tolist(), strict=True):
        if not name:
            raise ValueError(f"{file} row {line}: path is empty")
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{file} names {len(missing)} of {len(names)} photographs that are not there: {missing[0]}"
        )
    positions, lines = None, table.lines.tolist()
    if {"lat", "lon"} <= columns.keys():
        lat, lon = (table.numbers(columns[name]) for name in ("lat", "lon"))
        positions = from_lat_lon(lat, lon, file, lines=lines, missing_ok=True)
    elif {"east", "north"} <= columns.keys():
        east, north = (table.numbers(columns[name]) for name in ("east", "north"))
        zones = [text or "" for text in table.text(columns["zone"]).to_pylist()] if "zone" in columns else None
        positions = from_metres(east, north, file, zones=zones, lines=lines, missing_ok=True)
    return of_files(file.parent, names, positions)


def of_benchmark(spec: str, data_root: Path) -> PhotoList:
    """The database of a benchmark of the catalogue. Raises ValueError if the spec stands for several."""
    from eval.benchmarks.load import load_benchmarks

    benchmarks = load_benchmarks([spec], data_root)
    databases = {tuple(benchmark.database) for benchmark in benchmarks}
    if len(databases) > 1:
        raise ValueError(
            f"{spec} stands for {len(benchmarks)} benchmarks of {len(databases)} databases "
            f"({', '.join(benchmark.name for benchmark in benchmarks[:3])}, ...); name one of them"
        )
    paths = list(databases.pop())
    root = data_root if all(path.is_relative_to(data_root) for path in paths) else Path("/")
    names = [path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in paths]
    return of_files(root, names, notes=tuple(benchmarks[0].notes))


def of_shards(location: str, retry_s: float = 120.0) -> PhotoList:
    """The photographs of a shard set, here or behind a URL, by place and view; `retry_s` as in `list_source`."""
    from data_pipeline.index import read_index
    from data_pipeline.storage import RangeReader, join

    reader = RangeReader(retry_s=retry_s)
    index = read_index(location, reader)
    table = index.table.select(["city", "city_place_id", "view", "shard", "lat", "lon", "year", "month"])
    names = [
        f"{city}_{place:07d}.{view:02d}.jpg"
        for city, place, view in zip(*(table[c].to_pylist() for c in ("city", "city_place_id", "view")), strict=True)
    ]
    lat, lon = (table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("lat", "lon"))
    when, odd = _months(table)
    place_of = np.repeat(np.arange(index.num_places), index.num_views)
    versions = {shard.name: shard.sha256 for shard in index.metadata.shards}
    shards = [index.metadata.shards[int(number)].name for number in index.place_shard]

    def read(i: int) -> bytes:
        shard = shards[int(place_of[i])]
        where = join(location, shard)
        return reader.read(where, int(index.offset[i]), int(index.size[i]), version=versions[shard])

    return PhotoList(
        root=location,
        names=names,
        positions=from_lat_lon(lat, lon, location, missing_ok=True),
        identity=index.digest,
        read=read,
        when=when,
        notes=tuple(odd),
    )


def _months(table: pa.Table) -> tuple[NDArray[np.datetime64], list[str]]:
    """The first second of each image's month, NaT where its year is not known, and a note on those of no calendar."""
    year, month = (pc.fill_null(table[name], 0).to_numpy().astype(np.int64) for name in ("year", "month"))
    odd = (year < 0) | (year > LAST_YEAR) | (month < 0) | (month > MONTHS)
    when = np.full(len(year), np.datetime64("NaT"), dtype="datetime64[s]")
    known = (year > 0) & ~odd
    months = np.maximum(month[known] - 1, 0).astype("timedelta64[M]")
    first = (year[known] - 1970).astype("datetime64[Y]").astype("datetime64[M]") + months
    when[known] = first.astype("datetime64[s]")
    if not (count := int(odd.sum())):
        return when, []
    return when, [f"{count} photographs have a year or month that is none: when they were taken is not known"]
