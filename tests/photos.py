"""A small data set in GSV-Cities' native layout: real JPEGs of seeded noise, odd sizes and all kinds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = ["place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid"]

THREE_CITIES = {
    "Oslo": {3: 4, 12: 5, 700: 4, 8: 2},
    "Alta": {0: 6, 3: 4, 4: 3, 12345678: 4},
    "San-Juan_2": {5: 4, 6: 11},
}

SMALL_SHARD = 12_000


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their paths in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def jpeg(rng: np.random.Generator, chroma: str = "4:2:0") -> bytes:
    """A JPEG of a random size, sometimes grey, sometimes progressive."""
    width, height = (int(side) for side in rng.integers(9, 70, size=2))
    coarse = Image.fromarray(rng.integers(0, 256, size=(5, 6, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.2:
        image = image.convert("L")
    data = io.BytesIO()
    quality, progressive = int(rng.integers(60, 96)), bool(rng.random() < 0.3)
    image.save(data, "JPEG", quality=quality, progressive=progressive, subsampling=chroma)
    return data.getvalue()


def write_noise_benchmark(folder: Path) -> None:
    """A benchmark of noise in the field's UTM layout: 7 database images 100 m apart, 5 queries at the first ones."""
    rng = np.random.default_rng(0)
    for part, count in (("database", 7), ("queries", 5)):
        images = folder / "images" / "test" / part
        images.mkdir(parents=True)
        for i in range(count):
            (images / f"@{500000 + 100 * i}@4000000@33@T@@@{i}@@@@@@@@.jpg").write_bytes(jpeg(rng))


def write_jpegs(folder: Path, count: int, seed: int) -> list[Path]:
    """JPEGs of odd sizes, some of them grey or progressive: `0.jpg` and so on."""
    rng = np.random.default_rng(seed)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        path.write_bytes(jpeg(rng))
    return paths


def write_blurred_noise(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """PNGs of `size` (width, height) with patches of colour: `0.png` and so on."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size).save(path)
    return paths


def write_gsv_cities(
    folder: Path, cities: Mapping[str, Mapping[int, int]] = THREE_CITIES, seed: int = 0
) -> dict[tuple[str, int], list[Path]]:
    """Write cities of {place: number of images} to `folder`; the images of each (city, place) in order of CSV rows.

    Rows are shuffled over places, line ends are Windows', a column nobody asked for comes first, and coordinates are
    written as no float prints itself: all of that is met in the wild.
    """
    rng = np.random.default_rng(seed)
    (folder / "Dataframes").mkdir(parents=True)
    files: dict[tuple[str, int], list[Path]] = {}
    for city, places in cities.items():
        (folder / "Images" / city).mkdir(parents=True)
        with (folder / "Dataframes" / f"{city}.csv").open("w", newline="") as out:
            table = csv.DictWriter(out, ["comment", *COLUMNS], lineterminator="\r\n")
            table.writeheader()
            for place in rng.permutation(np.repeat(list(places), list(places.values()))).tolist():
                of_place = files.setdefault((city, place), [])
                lat, lon = f"{rng.uniform(-90, 90):.5f}0", f"{rng.uniform(-180, 180):.1f}"
                year, month, degrees = (int(rng.integers(*span)) for span in ((2007, 2023), (1, 13), (0, 360)))
                pano = f"pano_{place}-{len(of_place)}"
                values = [place, year, month, degrees, city, lat, lon, pano]
                table.writerow({"comment": "", **dict(zip(COLUMNS, values, strict=True))})
                name = f"{city}_{place:07d}_{year:04d}_{month:02d}_{degrees:03d}_{lat}_{lon}_{pano}.jpg"
                of_place.append(folder / "Images" / city / name)
                of_place[-1].write_bytes(jpeg(rng))
    return files
