"""Locations as files: JSON, CSV, GeoJSON, hloc's pairs and descriptors, one page; each whole or absent."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from configs.files import replacing
from configs.reading import as_utf_8
from eval.index.index import Index
from eval.index.location import Location

Write = Callable[[Path, Location], None]

COLUMNS = [
    *("query", "rank", "candidate", "similarity", "matches", "candidate_lat", "candidate_lon"),
    *("candidate_east", "candidate_north", "candidate_zone", "apart_m"),
    *("in_map", "confidence", "threshold", "lat", "lon", "east", "north", "zone", "spread_m", "support", "error"),
]


@contextmanager
def writers(targets: Mapping[str, Path | None], index: Index) -> Iterator[Write]:
    """What takes each location and its file, for all kinds that have a target; files appear when the block ends.

    Raises ValueError where h5py is not installed, OSError naming a file that cannot be written.
    """
    with ExitStack() as stack:
        writing = [
            stack.enter_context(_html(path, index) if kind == "html" else KINDS[kind](path))
            for kind, path in targets.items()
            if path
        ]

        def write(path: Path, location: Location) -> None:
            for one in writing:
                one(path, location)

        yield write


def as_json(location: Location) -> dict[str, Any]:
    """A location as JSON holds it, NaN as null and without the descriptor."""
    return {
        "query": location.query,
        "in_map": location.in_map,
        "confidence": _number(location.confidence),
        "threshold": _number(location.threshold),
        "position": None if location.position is None else _plain(vars(location.position)),
        "patches": location.patches,
        "candidates": [_plain(vars(candidate)) for candidate in location.candidates],
        "error": location.error or None,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _number(value) for key, value in values.items()}


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield file


@contextmanager
def _array(path: Path, head: str, tail: str, item: Callable[[Location], dict[str, Any]]) -> Iterator[Write]:
    """A JSON array between `head` and `tail`, written item by item."""
    with _text(path) as file:
        before = head

        def write(_: Path, location: Location) -> None:
            nonlocal before
            file.write(before + json.dumps(item(location), ensure_ascii=False, allow_nan=False))
            before = ",\n"

        yield write
        file.write((head if before == head else "") + tail)


@contextmanager
def _json(path: Path) -> Iterator[Write]:
    with _array(path, "[\n", "\n]\n", as_json) as write:
        yield write


@contextmanager
def _geojson(path: Path) -> Iterator[Write]:
    head = '{"type": "FeatureCollection", "features": [\n'
    with _array(path, head, "\n]}\n", _feature) as write:
        yield write


def _feature(location: Location) -> dict[str, Any]:
    """A point (longitude, latitude: RFC 7946), or no geometry where degrees are unknown."""
    place, best = location.position, location.best
    known = place is not None and math.isfinite(place.lat)
    point = {"type": "Point", "coordinates": [place.lon, place.lat]} if place is not None and known else None
    said = as_json(location)
    properties = {key: said[key] for key in ("query", "in_map", "confidence", "threshold", "error")}
    properties |= {
        "spread_m": place.spread_m if place else None,
        "support": place.support if place else None,
        "candidate": best.name if best else None,
        "similarity": best.similarity if best else None,
        "matches": best.matches if best else None,
    }
    return {"type": "Feature", "geometry": point, "properties": properties}


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    with _text(path) as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()

        def write(_: Path, location: Location) -> None:
            said = as_json(location)
            place = said["position"] or {}
            common = {key: said[key] for key in ("query", "in_map", "confidence", "threshold", "error")}
            common |= {key: place.get(key) for key in ("lat", "lon", "east", "north", "zone", "spread_m", "support")}
            for rank, one in enumerate(said["candidates"], 1):
                of = {f"candidate_{key}": one[key] for key in ("lat", "lon", "east", "north", "zone")}
                of |= {key: one[key] for key in ("similarity", "matches", "apart_m")}
                table.writerow({**common, **of, "rank": rank, "candidate": one["name"]})
            if not said["candidates"]:
                table.writerow(common)

        yield write


@contextmanager
def _pairs(path: Path) -> Iterator[Write]:
    """hloc's pairs: the names of a query and of a candidate, a space between, a line per pair."""
    with _text(path) as file:

        def write(_: Path, location: Location) -> None:
            file.writelines(f"{location.query} {candidate.name}\n" for candidate in location.candidates)

        yield write


@contextmanager
def _h5(path: Path) -> Iterator[Write]:
    """hloc's features: a group per image, in it `global_descriptor`, float32 [D]."""
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError("--h5 needs h5py: pip install h5py") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, h5py.File(partial, "w") as file:

        def write(_: Path, location: Location) -> None:
            name = as_utf_8(location.query)
            if location.descriptor is not None and name not in file:  # one name twice is one file
                group = file.create_group(name)
                group.create_dataset("global_descriptor", data=location.descriptor)

        yield write


@contextmanager
def _html(path: Path, index: Index) -> Iterator[Write]:
    from eval.report.located_page import LocatedPage

    with _text(path) as file:
        page = LocatedPage(file, index)
        yield page.write
        page.end()


KINDS = {"json": _json, "csv": _csv, "geojson": _geojson, "pairs": _pairs, "h5": _h5}
