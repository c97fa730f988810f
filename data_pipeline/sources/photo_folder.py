"""A folder of photographs as a telephone leaves them: positions and headings from EXIF, places from cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.files import file_sha256
from configs.progress import OnProgress, untold
from configs.reading import reason
from data_pipeline.exif import CameraFacts, read_exif
from data_pipeline.listing import PlaceListing, build_listing, plain_city
from data_pipeline.photographs import list_photographs
from data_pipeline.positions import Positions, from_lat_lon
from data_pipeline.sources.cells import (
    CellSize,
    Grid,
    cell_sizes,
    neighbour_distances,
    place_of_images,
    plane,
    suggested,
)
from data_pipeline.sources.track import Track

DUPLICATE = "the same bytes as another"


@dataclass(frozen=True)
class PhotoFolder:
    """What a folder of photographs holds: names with the camera's facts of each, and every name left out with why.

    `note` is on the files that are no photographs.
    """

    source: Path
    names: list[str]
    facts: list[CameraFacts]
    left_out: list[tuple[str, str]]
    note: str = ""

    def reasons(self) -> dict[str, int]:
        """How many photographs were left out, by reason."""
        return dict(Counter(why for _, why in self.left_out).most_common())


@dataclass(frozen=True)
class CellSurvey:
    """What the positions say of cells: metres to the nearest other photograph [N], and what each size would give."""

    neighbours_m: NDArray[np.float64]
    errors_m: NDArray[np.float64]
    sizes: list[CellSize]
    suggested_m: float | None


def read_photo_folder(source: Path, on_progress: OnProgress = untold, *, track: Track | None = None) -> PhotoFolder:
    """The photographs below `source` that say where they were taken; those that do not are named with why.

    A track gives positions to those without GPS, by their time.
    Of photographs with the same bytes the one with the shortest name is kept. Raises FileNotFoundError for a folder
    without photographs, OSError for one that cannot be read, ValueError where none of them has a position.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give one of photographs whose EXIF holds GPS")
    found = list_photographs(source)
    if not found.names:
        said = f" ({found.note()})" if found.left_out else ""
        raise FileNotFoundError(f"{source}: no photographs in it{said}")
    twice = _same_bytes(source, found.names)
    names: list[str] = []
    facts: list[CameraFacts] = []
    left_out: list[tuple[str, str]] = []
    for number, name in enumerate(found.names, 1):
        fact = CameraFacts(fault=DUPLICATE) if name in twice else _facts(source / name, track)
        if fact.fault:
            left_out.append((name, fact.fault))
        else:
            names.append(name)
            facts.append(fact)
        on_progress(number, len(found.names))
    folder = PhotoFolder(source, names, facts, left_out, found.note())
    if not names:
        told = ", ".join(f"{why} {count}" for why, count in folder.reasons().items())
        raise ValueError(
            f"{source}: none of {len(found.names)} photographs says where it was taken ({told}); was the camera "
            "allowed to use its position? --track gives positions by time, `shard manifest` takes lat and lon"
        )
    return folder


def survey_cells(folder: PhotoFolder, grid: Grid, least: int) -> CellSurvey:
    """What the positions say of cells, for places of at least `least` images and `grid`'s sectors."""
    east, north, _ = plane(_positions(folder))
    heading, errors_m = (_known(getattr(fact, name) for fact in folder.facts) for name in ("heading", "error_m"))
    sizes = cell_sizes(east, north, heading, grid, least)
    return CellSurvey(neighbour_distances(east, north), errors_m[~np.isnan(errors_m)], sizes, suggested(sizes))


def list_photo_folder(
    folder: PhotoFolder, survey: CellSurvey, *, city: str = "", grid: Grid, min_images_per_place: int = 4
) -> PlaceListing:
    """The places of a folder by `grid`.

    The city is `city`, or the folder's name; UTM zones far apart and the grid's groups get suffixes.
    Raises ValueError where no two places have enough photographs, saying what would do by the survey.
    """
    facts = folder.facts
    heading = _known(fact.heading for fact in facts)
    positions = _positions(folder)
    east, north, zone_suffix = plane(positions)
    suffix, place = place_of_images(east, north, heading, grid)
    base = city or plain_city(folder.source.resolve().name)
    images = pa.table(
        {
            "city": [f"{base}{a}{b}" for a, b in zip(zone_suffix, suffix, strict=True)],
            "place": place,
            "year": pa.array([fact.taken.year if fact.taken else None for fact in facts], pa.int64()),
            "month": pa.array([fact.taken.month if fact.taken else None for fact in facts], pa.int64()),
            "northdeg": pa.array([None if np.isnan(h) else round(h) % 360 for h in heading.tolist()], pa.int64()),
            "lat": positions.lat,
            "lon": positions.lon,
            "panoid": [Path(name).stem for name in folder.names],
            "file": folder.names,
            "csv": [""] * len(facts),
            "row": np.arange(len(facts)),
        }
    )
    try:
        listing = build_listing(
            folder.source,
            images,
            min_images_per_place=min_images_per_place,
            names_say_all=False,
            notes=_notes(folder, positions.notes),
        )
    except ValueError as error:
        turned = grid.heading_deg < 360 and not np.isnan(heading).all()
        raise ValueError(f"{error}{_what_would_do(survey, grid, turned)}") from error
    if listing.num_places < 2:
        raise ValueError(
            f"{folder.source}: all {listing.num_images} photographs show one place (they lie within "
            f"{_extent(east, north):.0f} m); training needs two"
        )
    return replace(listing, left_out=tuple(folder.left_out))


def _extent(east: NDArray[np.float64], north: NDArray[np.float64]) -> float:
    return float(np.hypot(np.ptp(east), np.ptp(north)))


def _positions(folder: PhotoFolder) -> Positions:
    lat, lon = (_known(getattr(fact, name) for fact in folder.facts) for name in ("lat", "lon"))
    return from_lat_lon(lat, lon, folder.source)


def _what_would_do(survey: CellSurvey, grid: Grid, has_sectors: bool) -> str:
    if survey.suggested_m and survey.suggested_m != grid.cell_m:
        return f", or use --cell-m {survey.suggested_m:g}"
    return ", or use --heading-deg 360" if has_sectors else ""


def _notes(folder: PhotoFolder, odd: Sequence[str]) -> list[str]:
    notes = [folder.note] if folder.note else []
    if folder.left_out:
        told = ", ".join(f"{why} {count}" for why, count in folder.reasons().items())
        notes.append(f"left out: {len(folder.left_out)} photographs ({told}); max-bad does not count them")
    without = sum(fact.heading is None for fact in folder.facts)
    if without:
        notes.append(f"{without} of {len(folder.facts)} photographs have no heading; in each cell they are one place")
    return [*notes, *odd]


def _facts(path: Path, track: Track | None) -> CameraFacts:
    try:
        facts = read_exif(path)
        return track.locate(path.name, facts.taken) if facts.fault and track else facts
    except (ValueError, OSError) as error:
        text = reason(error).removeprefix(f"{path}: ").removeprefix("not a readable photograph ")
        return CameraFacts(fault=f"unreadable {text}" if "(" in text else text)


def _same_bytes(source: Path, names: list[str]) -> set[str]:
    """Names of the photographs whose bytes one of a shorter name has; only those of one length are read."""
    by_size: dict[int, list[str]] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        by_size.setdefault((source / name).stat().st_size, []).append(name)
    twice: set[str] = set()
    for same in by_size.values():
        seen: set[str] = set()
        for name in same if len(same) > 1 else ():
            try:
                digest = file_sha256(source / name)
            except OSError:
                continue  # what cannot be read is reported as such
            if digest in seen:
                twice.add(name)
            seen.add(digest)
    return twice


def _known(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)
