"""Views of places_mini's Tower and Facades that the ablation's trainings do not see, and the benchmark made of them."""

from __future__ import annotations

import csv
from pathlib import Path

from configs.files import write_whole
from data_pipeline.town.render import image_name

CITIES = ("Facades", "Tower")
SHARE = 4  # a place with n views loses n / SHARE of them, rounded down: Tower's 1 of 5, Facades' 2 to 7 of 8 to 30
BENCHMARK = "held_out_views"


def write_without_held_out(source: Path, folder: Path) -> Path:
    """places_mini in `folder` without its held-out views, its images links; returns the manifest of the benchmark.

    The last quarter of each place's views, in the order of their names, are its queries; its database is the first view
    of each place, which is trained on, as a map is that a network is tuned for. Does nothing if the manifest is there.
    """
    manifest = folder / f"{BENCHMARK}.csv"
    if manifest.is_file():
        return manifest
    (folder / "Dataframes").mkdir(parents=True, exist_ok=True)
    if not (folder / "Images").exists():
        (folder / "Images").symlink_to((source / "Images").absolute(), target_is_directory=True)
    lines = ["path,role,place"]
    for file in sorted((source / "Dataframes").glob("*.csv")):
        with file.open(newline="") as opened:
            reader = csv.DictReader(opened)
            rows, columns = list(reader), list(reader.fieldnames or [])
        if file.stem in CITIES:
            seen, held_out = _apart(rows)
            firsts = {row["place_id"]: row for row in reversed(seen)}.values()
            for role, those in (("database", firsts), ("query", held_out)):
                for row in those:
                    image = folder.absolute() / "Images" / file.stem / image_name(row)
                    lines.append(f"{image},{role},{file.stem} {row['place_id']}")
            rows = seen
        with (folder / "Dataframes" / file.name).open("w", newline="") as opened:
            writer = csv.DictWriter(opened, columns)
            writer.writeheader()
            writer.writerows(rows)
    write_whole(manifest, "\n".join(lines) + "\n")
    return manifest


def _apart(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Views that are trained on, and those held out, each place's in the order of their names."""
    places: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: row["panoid"]):
        places.setdefault(row["place_id"], []).append(row)
    seen, held_out = [], []
    for views in places.values():
        kept = len(views) - len(views) // SHARE
        seen += views[:kept]
        held_out += views[kept:]
    return seen, held_out
