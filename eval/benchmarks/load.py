"""From the names in a recipe to benchmarks that can be run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from configs.names import nearest
from configs.reading import as_utf_8
from configs.registry import BENCHMARKS, NOT_RUN
from data_pipeline.positions import Positions, metres_between, suspicions
from eval.benchmarks.benchmark import NO_LABELS, RADIUS_M, Benchmark, BenchmarkError
from eval.benchmarks.catalogue import ALIASES, CATALOGUE
from eval.benchmarks.folders import any_folder, two_folders
from eval.benchmarks.manifest import manifest
from eval.benchmarks.named import LAYOUTS, read_layout
from eval.benchmarks.places import taken
from eval.benchmarks.plugged import read_plugged

Labels = Literal["needed", "found", "unused"]
"""Ground truth: refused where there is none, used where there is some, or not looked at."""

KINDS = ("folder", "manifest", "layout")
FAR_M = 10_000


@dataclass(frozen=True)
class Spec:
    """`KIND:PATH[:METRES]` taken apart: a path that exists, the radius if one is named, and notes on the choice."""

    path: Path
    radius_m: float | None
    notes: tuple[str, ...] = ()


def load_benchmarks(
    specs: list[str],
    data_root: Path,
    *,
    labels: Labels = "needed",
    radius_m: float | None = None,
    pair: tuple[Path, Path] | None = None,
) -> list[Benchmark]:
    """The benchmarks that the specs name, from their folders under `data_root`; a spec may stand for several.

    `NAME[/OPTION...]` is an entry of the catalogue, `folder:PATH[:METRES]` any folder of photographs,
    `manifest:FILE[:METRES]` a table of one's own, and `layout:LAYOUT:PATH[:METRES]` any layout under any name. A PATH
    is one of the working folder, or of `data_root`. `pair` are a database and a folder of queries to be read besides;
    `radius_m` is the radius of all of these that name none. Raises ValueError naming the nearest known benchmark,
    FileNotFoundError naming the folder that is missing.
    """
    if radius_m is not None and not 0 < radius_m < float("inf"):
        raise ValueError(f"--radius-m is {radius_m:g}; expected a positive number of metres")
    found: list[Benchmark] = []
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if rest and kind in KINDS:
            found += _of_path(spec, kind, rest, data_root, radius_m, labels != "unused")
            continue
        _refuse_radius(spec, radius_m)
        found += _of_catalogue(spec, data_root)
    if pair:
        name = as_utf_8(f"{pair[1].resolve().name} in {pair[0].resolve().name}")
        benchmark = two_folders(name, *pair, radius_m or RADIUS_M, labels=labels != "unused")
        found.append(replace(benchmark, layout=f"{pair[0]}, {pair[1]}, {benchmark.layout}"))
    return _told_apart([_checked(benchmark, labels) for benchmark in found])


def _of_catalogue(spec: str, data_root: Path) -> list[Benchmark]:
    given, *options = spec.split("/")
    if BENCHMARKS.origin(given):
        return read_plugged(given, data_root / given, options)
    name = given
    if given in ALIASES:
        name, *more = ALIASES[given].split("/")
        options = [*more, *options]
    if name not in CATALOGUE:
        known = [*BENCHMARKS, *ALIASES, "folder:PATH", "manifest:FILE", "layout:LAYOUT:PATH"]
        raise ValueError(f"unknown benchmark {given!r}; {'; '.join([nearest(given, known), *NOT_RUN.values()])}")
    CATALOGUE[name].check(name, options)
    folder = next((path for path in (data_root / given, data_root / name) if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"benchmark {given}: no folder {given} in the data root {data_root}")
    return CATALOGUE[name].load(name, folder, options)


def _of_path(spec: str, kind: str, rest: str, data_root: Path, radius_m: float | None, labels: bool) -> list[Benchmark]:
    layout, entry, options = "", "", [""]
    if kind == "layout":
        layout, colon, rest = rest.partition(":")
        entry, *options = layout.split("/")
        if layout not in LAYOUTS and entry not in CATALOGUE:
            raise ValueError(f"unknown layout {layout!r}; {nearest(layout, [*LAYOUTS, *CATALOGUE])}")
        if not colon or not rest:
            raise ValueError(f"benchmark {spec}: expected layout:LAYOUT:PATH")
    is_there = Path.is_file if kind == "manifest" else Path.exists if kind == "folder" else _is_there_or_a_stem
    taken_apart = _taken_apart(spec, rest, data_root, radius_m, is_there)
    path, radius_m = taken_apart.path, taken_apart.radius_m
    name = as_utf_8(path.stem if kind == "manifest" else path.resolve().name)
    if kind == "folder":
        found = [any_folder(name, path, radius_m, labels=labels)]
    elif kind == "manifest":
        found = [manifest(name, path, radius_m, labels=labels)]
    elif layout in LAYOUTS:
        found = [read_layout(layout, name, path, radius_m)]
    else:
        _refuse_radius(spec, radius_m)
        CATALOGUE[entry].check(entry, options)
        found = CATALOGUE[entry].load(name, path, options)
    return [replace(benchmark, notes=(*taken_apart.notes, *benchmark.notes)) for benchmark in found]


def _refuse_radius(spec: str, radius_m: float | None) -> None:
    if radius_m is not None:
        raise ValueError(f"benchmark {spec} has its own protocol; a radius is of folders, tables and positions")


def _is_there_or_a_stem(path: Path) -> bool:
    """Whether there is such a folder, or files of its parent begin with its name."""
    return path.exists() or (path.parent.is_dir() and any(path.parent.glob(f"{path.name}*")))


def _taken_apart(
    spec: str, rest: str, data_root: Path, default_m: float | None, is_there: Callable[[Path], bool]
) -> Spec:
    """A path that exists wins over one with `:METRES` behind it, and the working folder over `data_root`."""
    prefix, colon, metres = rest.rpartition(":")
    try:
        radius_m = float(metres) if colon else None
    except ValueError:
        radius_m = None
    forms = [(Path(rest), default_m)] + ([(Path(prefix), radius_m)] if prefix and radius_m is not None else [])
    for path, its_radius_m in forms:
        there = [place for place in (path, data_root / path) if is_there(place)]
        if not there:
            continue
        if its_radius_m is not None and not 0 < its_radius_m < float("inf"):
            raise ValueError(f"benchmark {spec}: the radius is {its_radius_m:g} m; expected a positive number")
        if len(there) == 2 and not there[0].samefile(there[1]):
            return Spec(path, its_radius_m, (f"{path} of the working folder is read, not {data_root / path}",))
        return Spec(there[0], its_radius_m)
    path = forms[-1][0]
    tried = dict.fromkeys(map(str, (path, data_root / path)))
    what = "table" if spec.startswith("manifest:") else "images"
    raise FileNotFoundError(f"benchmark {spec}: no {what}: there is no {' and no '.join(tried)}")


def _told_apart(benchmarks: list[Benchmark]) -> list[Benchmark]:
    """The benchmarks, numbered where several have one name: pictures and predictions are kept by it."""
    seen: Counter[str] = Counter()
    named = []
    for benchmark in benchmarks:
        seen[benchmark.name] += 1
        number = seen[benchmark.name]
        named.append(benchmark if number == 1 else replace(benchmark, name=f"{benchmark.name} ({number})"))
    return named


def _checked(benchmark: Benchmark, labels: Labels) -> Benchmark:
    """The benchmark if it can be run, with notes on what of its ground truth is missing or looks wrong."""
    if not benchmark.database or not benchmark.queries:
        empty = "queries" if benchmark.database else "database images"
        raise BenchmarkError(f"benchmark {benchmark.name}: no {empty}")
    notes = list(benchmark.notes)
    if labels == "unused":
        benchmark = _unlabelled(benchmark)
    elif not benchmark.num_labelled:
        if labels == "needed":
            raise BenchmarkError(
                f"benchmark {benchmark.name} has no ground truth ({benchmark.layout}), and so no recall; `rerankvpr "
                "eval` makes predictions without"
            )
        notes.append(f"no ground truth was found ({benchmark.layout}): predictions without recall")
    else:
        notes += _on_ground_truth(benchmark)
    shared = set(benchmark.database) & set(benchmark.queries)
    if shared:
        notes.append(f"{len(shared)} queries are database images themselves ({min(shared).name}): each finds itself")
    return replace(benchmark, notes=tuple(notes))


def _unlabelled(benchmark: Benchmark) -> Benchmark:
    count = len(benchmark.queries)
    return replace(
        benchmark,
        protocol=NO_LABELS,
        positive_offsets=np.zeros(count + 1, dtype=np.int64),
        positive_ids=np.zeros(0, dtype=np.int64),
        labelled_Q=np.zeros(count, dtype=bool),
    )


def _on_ground_truth(benchmark: Benchmark) -> list[str]:
    """What is to be said of the ground truth. Raises BenchmarkError if no query has a positive."""
    if not len(benchmark.positive_ids):
        raise BenchmarkError(
            f"benchmark {benchmark.name}: none of {benchmark.num_labelled} queries has a positive "
            f"({benchmark.protocol}{_apart(benchmark)}); do database and queries share a ground truth and a map zone?"
        )
    notes = []
    labelled = np.flatnonzero(benchmark.is_labelled_Q)
    if len(labelled) < len(benchmark.queries):
        notes.append(
            f"{len(labelled)} of {len(benchmark.queries)} queries have ground truth and count; the others are "
            "predicted, not counted"
        )
    if missing := benchmark.num_without_positive:
        first = benchmark.queries[int(np.argmax(benchmark.without_positive_Q))]
        notes.append(f"{missing} of {len(labelled)} queries have no positive and count as misses ({first.name})")
    positives = [benchmark.positives(int(query)) for query in labelled]
    at = (benchmark.at.queries, benchmark.at.database) if benchmark.at else (None, None)
    return [*notes, *suspicions(positives, len(benchmark.database), *at)]


def _apart(benchmark: Benchmark) -> str:
    """How far the queries are from the database, if that is known and far."""
    if benchmark.at is None:
        return ""
    firsts = [_first(positions) for positions in (benchmark.at.queries, benchmark.at.database)]
    metres = float(metres_between(*firsts)[0])
    if not metres > FAR_M:
        return ""
    return f"; the first of the queries lies {metres / 1000:,.0f} km from that of the database"


def _first(positions: Positions) -> Positions:
    return taken(positions, np.flatnonzero(positions.known)[:1])
