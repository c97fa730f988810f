"""Aligned sequences, where frame i of one drive shows the place of frame i of another: Gardens Point, Nordland."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from configs.names import nearest
from eval.benchmarks.benchmark import Benchmark, BenchmarkError, make_benchmark
from eval.benchmarks.ground_truth import clip_to, frames_within, read_lines, read_positives
from eval.benchmarks.layouts import vpr_bench
from eval.benchmarks.photographs import Photographs, existing, images_in

GARDENS_TRAVERSES = ("day_left", "day_right", "night_right")
GARDENS_PAIRS = (("day_right", "night_right"), ("day_left", "night_right"), ("day_right", "day_left"))
GARDENS_TOLERANCE = 2
GARDENS_FRAMES = 200
NORDLAND_FRAMES = 27592


def gardens_point(folder: Path, options: list[str]) -> list[Benchmark]:
    """`gardens_point[/DATABASE/QUERY|/all][/FIRST-LAST]`: three pairs of traverses, one, or all six; a range of frames.

    VPR-Bench's own folder (`query/`, `ref/`) is one benchmark. The published ground truth, where it lies in the folder,
    is compared and its faults noted.
    """
    if (folder / "ref").is_dir() and not options:
        return [vpr_bench("gardens_point", folder, f"+-{GARDENS_TOLERANCE} frames, VPR-Bench's query and ref")]
    options = list(options)
    first, last = 0, GARDENS_FRAMES - 1
    if options and re.fullmatch(r"\d+-\d+", options[-1]):
        first, last = (int(number) for number in options.pop().split("-"))
    if not first <= last < GARDENS_FRAMES:
        raise ValueError(f"gardens_point: frames {first}-{last} are out of range; use FIRST-LAST within 0-199")
    pairs: tuple[tuple[str, str], ...] = GARDENS_PAIRS
    if options == ["all"]:
        pairs = tuple(permutations(GARDENS_TRAVERSES, 2))
    elif options:
        pairs = (_pair(options),)
    is_part = (first, last) != (0, GARDENS_FRAMES - 1)
    positives = frames_within(last - first + 1, last - first + 1, GARDENS_TOLERANCE)
    notes = _gardens_notes(folder)
    benchmarks = []
    for database, query in pairs:
        drives = [_traverse(folder / traverse) for traverse in (database, query)]
        benchmarks.append(
            make_benchmark(
                f"gardens_point/{database}/{query}" + (f"/{first}-{last}" if is_part else ""),
                f"+-{GARDENS_TOLERANCE} frames, frames {first}-{last}",
                drives[0].paths[first : last + 1],
                drives[1].paths[first : last + 1],
                positives,
                [*notes, *drives[0].notes, *drives[1].notes],
            )
        )
    return [replace(one, layout="{day_left,day_right,night_right}/*.jpg") for one in benchmarks]


def _pair(options: list[str]) -> tuple[str, str]:
    for traverse in options:
        if traverse not in GARDENS_TRAVERSES:
            raise ValueError(f"gardens_point: unknown traverse {traverse!r}; {nearest(traverse, GARDENS_TRAVERSES)}")
    if len(options) != 2:
        raise ValueError("gardens_point: expected gardens_point[/DATABASE/QUERY][/FIRST-LAST] or gardens_point/all")
    if options[0] == options[1]:
        raise ValueError(f"gardens_point: {options[0]} against itself finds every query; name two traverses")
    return options[0], options[1]


def _gardens_notes(folder: Path) -> list[str]:
    source = folder / "ground_truth_new.npy"
    if not source.is_file():
        return []
    published, notes = clip_to(read_positives(source), GARDENS_FRAMES, source.name)
    ours = frames_within(GARDENS_FRAMES, GARDENS_FRAMES, GARDENS_TOLERANCE)
    if len(published) != GARDENS_FRAMES or any(a.tolist() != b.tolist() for a, b in zip(published, ours, strict=True)):
        raise BenchmarkError(f"ground truth {source} is not +-{GARDENS_TOLERANCE} frames of {GARDENS_FRAMES}")
    return notes


def _traverse(folder: Path) -> Photographs:
    found = images_in(folder)
    if len(found.paths) != GARDENS_FRAMES:
        raise BenchmarkError(f"{folder} holds {len(found.paths)} frames; Gardens Point has {GARDENS_FRAMES} a traverse")
    return found


def nordland_seasons(name: str, folder: Path) -> Benchmark:
    """Nordland as published: `summer/` (database) and `winter/` (queries), frames of one number aligned.

    `cleanImageNames.txt`, where there, names the 27,592 frames that are neither tunnel nor station. +-10 frames.
    """
    found = {season: images_in(folder / season) for season in ("summer", "winter")}
    parts = {season: photographs.paths for season, photographs in found.items()}
    notes = [note for photographs in found.values() for note in photographs.notes]
    if (listing := folder / "cleanImageNames.txt").is_file():
        wanted = read_lines(listing)
        parts = {season: existing([folder / season / image for image in wanted], listing) for season in parts}
    names = [[path.stem for path in paths] for paths in parts.values()]
    if names[0] != names[1]:
        alone = sorted(set(names[0]) ^ set(names[1]))
        raise BenchmarkError(
            f"{folder}: summer and winter differ ({len(alone)} frames, first {alone[:1]}); not aligned"
        )
    positives = frames_within(len(parts["winter"]), len(parts["summer"]), 10)
    return make_benchmark(name, "+-10 frames, all queries", parts["summer"], parts["winter"], positives, notes)
