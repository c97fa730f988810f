"""Which photographs `rerankvpr show` draws, by which network: given ones, those of a benchmark, an index or a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from configs.registry import BENCHMARKS
from launch.show_flags import OF_PATHS, ShowCommand

if TYPE_CHECKING:  # help and mistakes should not wait for torch
    from eval.benchmarks.benchmark import Benchmark
    from eval.describer import Describer
    from eval.index.index import Index
    from eval.index.location import Location

T = TypeVar("T")

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Chosen:
    """A network and what it is shown: photographs, or pairs of them."""

    describer: Describer
    images: list[Path]
    pairs: list[tuple[Path, Path]]
    note: str = ""

    def __str__(self) -> str:
        many = f"{len(self.pairs)} pairs" if self.pairs else f"{len(self.images)} images"
        return f"{many}, {self.describer.pixels}{f'; {self.note}' if self.note else ''}"


def choose(asked: ShowCommand) -> Chosen:
    """The photographs, and the network: --model, else that of the index or the run.

    Raises ValueError or OSError in one line: nothing named, no network, no photograph, no ground truth to pair by.
    """
    if asked.index is not None:
        return _of_index(asked, asked.index)
    what = asked.what
    run = _run(what)
    if run is None and not asked.model:
        raise ValueError(
            "show needs --model (a run's folder, a checkpoint, a file of weights or a backbone's name), or --index"
        )
    if run is not None or _is_benchmark(what):
        benchmark = one_benchmark(str(what[0]), asked.data_root) if run is None else _benchmark_of(run)
        return _of_benchmark(asked, benchmark, str(run or ""))
    images = _photographs(what, asked.most)
    if not images:
        raise ValueError(f"show {asked.kind} needs photographs, a folder of them, a benchmark, a run or --index")
    if asked.wants_pairs and len(images) < 2:
        raise ValueError("show matches needs two images or more: the query first, then its candidates; or --index")
    pairs = [(images[0], other) for other in images[1:]] if asked.wants_pairs else []
    return Chosen(_load(asked), images, pairs)


def one_benchmark(spec: str, data_root: Path) -> Benchmark:
    """The benchmark that a spec names. Raises ValueError if it stands for several."""
    from eval.benchmarks.load import load_benchmarks

    found = load_benchmarks([spec], data_root, labels="found")
    if len(found) > 1:
        names = ", ".join(benchmark.name for benchmark in found[:3])
        raise ValueError(f"{spec} stands for {len(found)} benchmarks ({names}, ...); name one of them")
    return found[0]


def _of_benchmark(asked: ShowCommand, benchmark: Benchmark, run: str) -> Chosen:
    """Queries, evenly spread, each with a photograph of the database that shows its place."""
    known = [query for query in range(len(benchmark.queries)) if len(benchmark.positives(query))]
    if asked.wants_pairs and not known:
        raise ValueError(
            f"benchmark {benchmark.name} has no ground truth to pair photographs by; name a query and its candidates"
        )
    pairs = []
    for query in _spread(known, asked.most if asked.wants_pairs else max(1, asked.most // 2)):
        positives = benchmark.positives(query)
        shown = int(positives[len(positives) // 2])  # of the frames around a query's the nearest
        pairs.append((benchmark.queries[query], benchmark.database[shown]))
    images = _each(pairs) or _spread(benchmark.queries, asked.most)
    note = f"queries of {benchmark.name}{', each with one of its positives' if pairs else ''}"
    return Chosen(_load(asked, run), images, pairs if asked.wants_pairs else [], note)


def _of_index(asked: ShowCommand, folder: Path) -> Chosen:
    """A photograph with what the index finds for it, several with the first of each, or the index's own."""
    if asked.settings:
        raise ValueError("--image-size does not go with --index: photographs are shown as the index encoded them")
    queries = _photographs(asked.what, asked.most if asked.wants_pairs else max(1, asked.most // 2))
    if asked.wants_pairs and not queries:
        raise ValueError(f"show matches --index {folder} needs a photograph, which is matched with what is found")
    from configs.plugins import load_plugins
    from eval.index.index import Index

    load_plugins(asked.plugins)
    index = Index.open(folder, network=_load(asked) if asked.model else None)
    if not len(index):
        raise ValueError(f"{folder}: the index is empty")
    if not queries:
        numbers = _spread(range(len(index)), asked.most)
        files, note = _files(index, numbers)
        images = [file for file in files if file is not None]
        return Chosen(index.describer, images, [], f"of the {len(index):,} photographs of {folder}{note}")
    candidates = 1 if len(queries) > 1 else asked.most if asked.wants_pairs else max(1, asked.most - 1)
    pairs, note = _found(index, queries, index.locate(queries, top_k=candidates))
    found = "the first" if len(queries) > 1 else "the best first"
    return Chosen(
        index.describer, _each(pairs), pairs if asked.wants_pairs else [], f"with what {folder} finds, {found}{note}"
    )


def _found(index: Index, queries: list[Path], locations: list[Location]) -> tuple[list[tuple[Path, Path]], str]:
    """Each query with each of its candidates, and a note on candidates that have no file."""
    for location in locations:
        if location.error:
            raise ValueError(location.error)
    numbers = [one.number for location in locations for one in location.candidates]
    asked = [query for query, location in zip(queries, locations, strict=True) for _ in location.candidates]
    files, note = _files(index, numbers)
    return [(query, file) for query, file in zip(asked, files, strict=True) if file is not None], note


def _files(index: Index, numbers: Sequence[int]) -> tuple[list[Path | None], str]:
    """The files of photographs, and a note on those that are gone. Raises ValueError if all are."""
    files = [index.path_of(number) for number in numbers]
    gone = files.count(None)
    if gone == len(files):
        name = f"{index.root_of(numbers[0])}/{index.images.names[numbers[0]]}"
        raise ValueError(f"{name} is no file here; an index is shown where the photographs are that it was built of")
    return files, f"; {gone} have no file here" if gone else ""


def _load(asked: ShowCommand, run: str = "") -> Describer:
    from trainer.pretrained import load

    return load(asked.model or run, plugins=asked.plugins, **asked.settings)


def _run(what: Sequence[Path]) -> Path | None:
    """The run or checkpoint that is named; None for anything else."""
    if len(what) != 1 or not ((what[0] / RECIPE).is_file() or (what[0] / "checkpoints").is_dir()):
        return None
    return what[0]


def _is_benchmark(what: Sequence[Path]) -> bool:
    """Whether the one word is a benchmark as `eval` takes it; a file or folder of that name wins."""
    if len(what) != 1 or what[0].exists():
        return False
    from eval.benchmarks.catalogue import ALIASES

    word = str(what[0])
    return word.startswith(OF_PATHS) or word.split("/")[0] in {*BENCHMARKS, *ALIASES}


def _benchmark_of(run: Path) -> Benchmark:
    """The first benchmark that a run validates on, or the places that it holds out."""
    from configs.load import load_stored_recipe
    from trainer.checkpoint_folder import find_checkpoint

    config = load_stored_recipe(find_checkpoint(run) / RECIPE).eval
    if config.benchmarks:
        return one_benchmark(config.benchmarks[0], config.data_root)
    held_out = sorted(run.glob("held_out-*/held_out.csv"), key=lambda file: file.stat().st_mtime)
    if not held_out:
        raise ValueError(f"{run}: its recipe names no benchmark; name photographs, with --model {run}")
    return one_benchmark(f"manifest:{held_out[-1]}", config.data_root)


def _photographs(what: Sequence[Path], most: int) -> list[Path]:
    """The files that are named, or at most `most` of the one folder that is."""
    from data_pipeline.photographs import list_photographs
    from eval.index.manifest import exists

    if len(what) != 1 or not what[0].is_dir():
        return list(what)
    (folder,) = what
    if exists(folder):
        raise ValueError(f"{folder} is an index: name it with --index {folder}, before it a photograph or nothing")
    listing = list_photographs(folder)
    if not listing.names:
        raise ValueError(f"{folder}: no photographs there{f' ({listing.note()})' if listing.note() else ''}")
    return [folder / name for name in _spread(listing.names, most)]


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spread from the first on."""
    step = max(1, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]


def _each(pairs: Sequence[tuple[Path, Path]]) -> list[Path]:
    """The photographs of pairs, each once, in their order."""
    return list(dict.fromkeys(path for pair in pairs for path in pair))
