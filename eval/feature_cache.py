"""Features of benchmarks' images, made once for all benchmarks that use them."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from configs.ranks import barrier
from eval.benchmarks.benchmark import Benchmark
from eval.features import StoredFeatures, is_extraction
from eval.scratch import common_temporary_folder


@dataclass(frozen=True)
class Cached:
    """Features, the seconds that extracting them took, and whether an earlier run had begun to."""

    features: StoredFeatures
    seconds: float
    of_earlier_run: bool


class FeatureCache:
    """Features lie in the folder `kept`, or in a temporary one until the last of the benchmarks has used them.

    The temporary folder is in `beside` if the ranks' hosts have none of their own in common. One gallery with many
    query sets is extracted once; the seconds it took count for each benchmark.
    """

    def __init__(self, benchmarks: list[Benchmark], kept: Path | None = None, beside: Path | None = None) -> None:
        self.kept, self.beside = kept, beside
        self.held: dict[tuple[tuple[Path, ...], str], Cached] = {}
        self._uses = Counter(tuple(paths) for b in benchmarks for paths in (b.database, b.queries))
        self._temporary: Path | None = None
        self._owner: TemporaryDirectory[str] | None = None  # removes it, on rank 0

    def find(self, paths: list[Path], key: str) -> Cached | None:
        """What is held of `paths`, made as `key` says."""
        return self.held.get((tuple(paths), key))

    def folder(self, key: str) -> Path:
        """Where features made as `key` says belong, the same on every rank; every rank must call this."""
        if self.kept:
            return self.kept / key[:16]
        if self._temporary is None:
            self._temporary, self._owner = common_temporary_folder(self.beside)
        return self._temporary / key[:16]

    def of_earlier_run(self, key: str) -> bool:
        """Whether an earlier run has begun features made as `key` says; to be asked before they are extracted."""
        return self.kept is not None and is_extraction(self.folder(key))

    def hold(self, paths: list[Path], key: str, cached: Cached) -> None:
        """Holds features until the last benchmark that has these images is released."""
        self.held[tuple(paths), key] = cached

    def release(self, benchmark: Benchmark) -> None:
        """Drops what no later benchmark needs, on every rank once all are done with it."""
        barrier()
        self._uses.subtract((tuple(benchmark.database), tuple(benchmark.queries)))
        for wanted in [wanted for wanted in self.held if self._uses[wanted[0]] <= 0]:
            cached = self.held.pop(wanted)
            if self.kept is None and dist.get_rank() == 0:
                shutil.rmtree(cached.features.folder, ignore_errors=True)  # NFS keeps what is still mapped
