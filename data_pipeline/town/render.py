"""The embedded data set: a procedural town, rendered from a seed, so that a first run needs no download.

    train/Images/<City>/*.jpg, train/Dataframes/<City>.csv    places to train on, in GSV-Cities' native layout
    images/test/database, images/test/queries                 held-out places, in the UTM convention of benchmarks
    town.json                                                 what was rendered, written last

Every place has its own random stream, so the files depend on the town alone and not on the processes that draw them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from configs.files import partial_of, remove_abandoned
from configs.progress import OnProgress, untold
from data_pipeline.shared_locks import process_pool, why_no_locks
from data_pipeline.town.conditions import Kind, draw_conditions
from data_pipeline.town.places import build_place
from data_pipeline.town.views import render_view

FORMAT = 1  # raised whenever the same town is drawn differently
CITIES = ("Harbour", "Hillside", "Oldtown")
MANIFEST = "town.json"
COLUMNS = ("place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid")

SPACING = 100.0  # metres between neighbouring places
POSITIVE_RADIUS = 25.0  # metres within which the field counts a database image as a positive

# The town lies on the central meridian of UTM zone 32U, where a kilometre of the map is a kilometre of the grid.
ZONE, ZONE_LETTER = 32, "U"
ORIGIN_EAST, ORIGIN_NORTH = 500_000.0, 5_316_300.0
ORIGIN_LAT, ORIGIN_LON = 48.0, 9.0
METRES_PER_LAT, METRES_PER_LON = 111_150.0, 74_595.0
_PANOID_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@dataclass(frozen=True)
class Town:
    """What decides every byte of a town. Raises ValueError on counts that give no training set or benchmark."""

    seed: int = field(default=0, metadata={"least": 0})
    places: int = field(default=180, metadata={"least": len(CITIES)})
    views: int = field(default=8, metadata={"least": 1})
    held_out_places: int = field(default=100, metadata={"least": 0})
    database_views: int = field(default=2, metadata={"least": 1})
    query_views: int = field(default=2, metadata={"least": 1})

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata["least"]
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"town {one.name} {value!r}: expected an integer of at least {least}")

    @property
    def images(self) -> int:
        return self.places * self.views + self.held_out_places * (self.database_views + self.query_views)


@dataclass(frozen=True)
class _Spot:
    """A place to render: `city` None is held out; `number` counts from 1 in each city."""

    index: int
    city: str | None
    number: int


def _spots(town: Town) -> Iterator[_Spot]:
    for i in range(town.places):
        yield _Spot(i, CITIES[i % len(CITIES)], i // len(CITIES) + 1)
    for i in range(town.held_out_places):
        yield _Spot(town.places + i, None, i + 1)


def _position(spot: _Spot) -> tuple[float, float]:
    """Metres east and north of the town's origin: a district of its own for each city, a grid of streets in it."""
    district = len(CITIES) if spot.city is None else CITIES.index(spot.city)
    row, column = divmod(spot.number - 1, 16)
    return district * 20 * SPACING + column * SPACING, row * SPACING


def _degrees(east: float, north: float) -> tuple[float, float]:
    return round(ORIGIN_LAT + north / METRES_PER_LAT, 7), round(ORIGIN_LON + east / METRES_PER_LON, 7)


def _render_spot(root: Path, town: Town, spot: _Spot) -> list[dict[str, str]]:
    """Writes the photographs of one place; returns their rows of the CSV (none for held-out places)."""
    rng = np.random.default_rng([town.seed, FORMAT, spot.index])
    place = build_place(rng)
    east0, north0 = _position(spot)
    bearing = float(rng.uniform(0, 360))  # of a camera that looks straight at the facades
    along = np.radians(bearing + 90)
    counts: dict[Kind, int] = {"any": town.views}
    if spot.city is None:
        counts = {"fair": town.database_views, "any": town.query_views}
    rows = []
    for kind in (kind for kind, count in counts.items() for _ in range(count)):
        now = draw_conditions(rng, kind)
        east, north = east0 + now.shift * np.sin(along), north0 + now.shift * np.cos(along)
        lat, lon = _degrees(east, north)
        year, northdeg = int(rng.integers(2008, 2024)), round(bearing + np.degrees(now.yaw)) % 360
        panoid = "".join(_PANOID_LETTERS[i] for i in rng.integers(0, 64, 22))
        if spot.city:
            row = {
                "place_id": str(spot.number),
                "year": str(year),
                "month": str(now.month),
                "northdeg": str(northdeg),
                "city_id": spot.city,
                "lat": str(lat),
                "lon": str(lon),
                "panoid": panoid,
            }
            rows.append(row)
            path = root / "train" / "Images" / spot.city / image_name(row)
        else:
            folder = "database" if kind == "fair" else "queries"
            fields = (
                f"{ORIGIN_EAST + east:.2f}", f"{ORIGIN_NORTH + north:.2f}", ZONE, ZONE_LETTER,
                f"{lat:.7f}", f"{lon:.7f}", panoid, "", northdeg, "", "", "", f"{year}{now.month:02d}", now.note,
            )  # fmt: skip
            path = root / "images" / "test" / folder / f"@{'@'.join(map(str, fields))}@.jpg"
        path.write_bytes(render_view(place, now, rng))
    return rows


def image_name(row: dict[str, str]) -> str:
    """The file name that GSV-Cities gives to the image of a CSV row; lat and lon stand in it as written in the CSV."""
    return (
        f"{row['city_id']}_{int(row['place_id']):07d}_{int(row['year']):04d}_{int(row['month']):02d}"
        f"_{int(row['northdeg']):03d}_{row['lat']}_{row['lon']}_{row['panoid']}.jpg"
    )


def _listing_digest(folder: Path) -> str:
    """SHA-256 of the relative path and size of every file but the manifest."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def town_is_current(folder: Path, town: Town) -> bool:
    """Whether the folder holds precisely this town: same parameters and format, every file with its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    described = {"format": FORMAT, **asdict(town)}
    if not isinstance(manifest, dict) or any(manifest.get(key) != value for key, value in described.items()):
        return False
    return manifest.get("listing_sha256") == _listing_digest(folder)


def _write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())


def render_town(
    folder: Path,
    town: Town = Town(),
    *,
    processes: int | None = None,
    on_progress: OnProgress = untold,
) -> None:
    """Renders the town into `folder`, which appears whole or not at all; an older town there is replaced.

    `processes` None uses every core the process may run on; `on_progress(done, total)` counts images. Raises ValueError
    where the folder holds something else than a town, so that nothing foreign is ever deleted.
    """
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes < 1:
        raise ValueError(f"town processes {processes}: expected at least 1")
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else than a town (no {MANIFEST}); name an empty or a new folder")
    remove_abandoned(folder)
    partial = partial_of(folder)
    for sub in (*(f"train/Images/{city}" for city in CITIES), "train/Dataframes", "images/test/database"):
        (partial / sub).mkdir(parents=True)
    (partial / "images/test/queries").mkdir()

    spots = list(_spots(town))
    rows: dict[int, list[dict[str, str]]] = {}
    done = 0
    pool: Executor = ThreadPoolExecutor(1) if why_no_locks() else process_pool(processes)
    try:
        futures = {pool.submit(_render_spot, partial, town, spot): spot for spot in spots}
        for future in as_completed(futures):
            spot = futures[future]
            rows[spot.index] = future.result()
            done += town.views if spot.city else town.database_views + town.query_views
            on_progress(done, town.images)
    finally:
        pool.shutdown(cancel_futures=True)
    for city in CITIES:
        _write_csv(
            partial / "train" / "Dataframes" / f"{city}.csv",
            [row for spot in spots if spot.city == city for row in rows[spot.index]],
        )
    manifest = {"format": FORMAT, **asdict(town), "images": town.images, "listing_sha256": _listing_digest(partial)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
