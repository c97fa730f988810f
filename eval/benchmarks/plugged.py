"""Benchmarks of plug-ins: a function reads one from its folder."""

from __future__ import annotations

from pathlib import Path

from configs.plugins import described
from configs.registry import BENCHMARKS
from eval.benchmarks.benchmark import Benchmark, BenchmarkError


def read_plugged(name: str, folder: Path, options: list[str]) -> list[Benchmark]:
    """What `registered(folder, *options)` returns, a benchmark or several; `folder` need not exist.

    Raises BenchmarkError naming the plug-in for anything else, and the line of it that raised; FileNotFoundError as it
    is.
    """
    try:
        found = BENCHMARKS.get(name)(folder, *options)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise BenchmarkError(f"benchmark {name}: {described(error)}") from error
    benchmarks = found if isinstance(found, list) else [found]
    for benchmark in benchmarks:
        if not isinstance(benchmark, Benchmark):
            raise BenchmarkError(
                f"benchmark {name} ({BENCHMARKS.origin(name)}) returned {type(benchmark).__name__}; expected a "
                "Benchmark, as make_benchmark makes it, or a list of them"
            )
    return benchmarks
