"""An index against bare FAISS: build time, memory, bytes, speed, recall; growth; larger ones on paper.

`python -m benchmarks.index [--rows 100000 1000000 10000000] [--descriptors IDX] [--json FILE]`. Descriptors are drawn
from a mixture of Gaussians on the sphere whose centres, spreads and common covariance are fitted on real descriptors
(`--descriptors`, an index; without it on clusters of clusters, which is said), written to a file and read from there as
an index reads its own. Each size and kind runs in a process of its own, whose peak memory is its own, mapped pages of
that file included. `ours` is what an index does: trained on a sample, filled in blocks, searched block by block, the
first candidates scored by their descriptors. `bare` is one FAISS index of the same factory string, trained on the same
sample, searched once, without that scoring. Recall is held against exact search by this project.
"""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.peak_memory import Peak
from benchmarks.report import print_table, write_json
from eval.approximate import sample_size, search_index, set_params, train_index
from eval.exact_scores import best
from eval.index.approximate_files import SHORTLIST
from eval.search import search_blocks
from eval.train_index import spread

PER_BLOCK = 1 << 18
NODE_GB = 512.0  # memory of a node on paper


@dataclass(frozen=True)
class Options:
    """What is measured."""

    rows: tuple[int, ...] = (100_000,)
    """Sizes of the index."""
    size: int = 256
    """Numbers of a descriptor."""
    queries: int = 200
    """Queries, drawn from the same mixture."""
    descriptors: Path | None = None
    """An index whose descriptors the mixture is fitted on."""
    clusters: int = 256
    """Clusters of the mixture."""
    factory: str = ""
    """Factory string; IVF with sqrt(rows) * 4 lists and PQ32 without it."""
    nprobe: tuple[int, ...] = (1, 4, 16, 64)
    """Search settings; FAISS's OperatingPoints keep those that no other beats."""
    json: Path | None = None
    """File for the figures."""
    folder: Path | None = None
    """Folder for the descriptors, as large as they are; one for temporary files without it."""
    part: str = ""
    """For this program's own processes: what one of them measures."""


def main() -> None:
    """Measures, prints, writes."""
    options = tyro.cli(Options, description=__doc__)
    if options.part:
        print(json.dumps(_measure(options)))
        return
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    for count in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            _draw(options, count, Path(folder))
            for kind in ("exact", "bare", "ours"):
                found = _in_process(options, kind, count, Path(folder))
                figures |= {f"{kind}_{count}_{name}": value for name, value in found.items()}
                rows += _lines(kind, count, options, found)
    columns = ["index", "build, s", "of it training", "peak MB", "bytes/image", "queries/s", "R@1", "R@10"]
    fitted = (
        f"fitted on {options.descriptors}" if options.descriptors else "of drawn clusters of clusters, no real ones"
    )
    title = f"Indices of {options.size} numbers per descriptor, a mixture {fitted}; * is an operating point of FAISS"
    print_table(title, columns, rows)
    figures |= _growth(options, figures)
    _on_paper(options, figures)
    write_json(options.json, figures)


def _lines(kind: str, count: int, options: Options, found: dict[str, float]) -> list[list[str]]:
    settings = [""] if kind == "exact" else [f"_{n}" for n in options.nprobe if f"qps_{n}" in found]
    lines = []
    for at in settings:
        speed = [f"{found[f'qps{at}']:,.0f}", f"{found[f'r1{at}']:.1f}", f"{found[f'r10{at}']:.1f}"]
        best_at = found.get(f"optimal{at}", 0.0)
        name = f"{kind} {count:,}" + (f" nprobe={at[1:]}{' *' if best_at else ''}" if at else "")
        cost = [f"{found['build_s']:.1f}", f"{found['train_s']:.1f}", f"{found['peak_mb']:,.0f}"]
        lines.append([name, *cost, f"{found['bytes_per_image']:.1f}", *speed])
    return lines


def _draw(options: Options, count: int, folder: Path) -> None:
    mixture = Mixture.of(options)
    np.save(folder / "queries.npy", mixture.draw(-1, options.queries))
    shape = (count, options.size)
    rows_ND = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.float32, shape=shape)
    for first, block_ND in mixture.blocks(count):
        rows_ND[first : first + len(block_ND)] = block_ND
    rows_ND.flush()


def _in_process(options: Options, kind: str, count: int, folder: Path) -> dict[str, float]:
    flags = ["--rows", str(count), "--size", str(options.size), "--queries", str(options.queries)]
    flags += ["--folder", str(folder), "--nprobe", *map(str, options.nprobe), "--part", kind]
    flags += ["--factory", options.factory] if options.factory else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.index", *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(options: Options) -> dict[str, float]:
    """One kind at one size, in this process."""
    count, kind = options.rows[0], options.part
    assert options.folder
    stored = Stored(np.load(options.folder / "rows.npy", mmap_mode="r"))
    queries_QD = np.load(options.folder / "queries.npy")
    _, truth_Q10 = search_blocks(queries_QD[:1], [(0, queries_QD)], 10)  # loads what FAISS loads at its first call
    if kind == "exact":
        memory, start = Peak(), time.perf_counter()
        _, truth_Q10 = search_blocks(queries_QD, stored.blocks(), 10)
        seconds = time.perf_counter() - start
        return {
            "build_s": 0.0,
            "train_s": 0.0,
            "peak_mb": memory.mb(),
            "bytes_per_image": 4.0 * options.size,
            "qps": options.queries / seconds,
            "r1": 100.0,
            "r10": 100.0,
        }
    _, truth_Q10 = search_blocks(queries_QD, stored.blocks(), 10)
    factory = options.factory or f"IVF{2 ** round(math.log2(4 * count**0.5))},PQ32"
    stored.forget()
    memory, start = Peak(), time.perf_counter()
    trained = train_index(
        factory, "", stored.sample(sample_size(factory, options.size, count, "--factory")), "--factory"
    )
    train_s = time.perf_counter() - start
    if kind == "bare":
        bare = faiss.clone_index(trained.index)
        for _, rows_ND in stored.blocks():
            bare.add(rows_ND)
        blocks = [(0, bare)]
    else:
        blocks = [(first, trained.filled(rows_ND)) for first, rows_ND in stored.blocks()]
    found = {"build_s": time.perf_counter() - start, "train_s": train_s, "peak_mb": memory.mb()}
    found["bytes_per_image"] = sum(_stored_bytes(index) for _, index in blocks) / count
    points = faiss.OperatingPoints()
    for nprobe in options.nprobe:
        for _, index in blocks:
            set_params(index, f"nprobe={nprobe}", factory)
        began = time.perf_counter()
        ids_Q10 = _ours(blocks, stored, queries_QD) if kind == "ours" else blocks[0][1].search(queries_QD, 10)[1]
        seconds = time.perf_counter() - began
        first = float((ids_Q10[:, :1] == truth_Q10[:, :1]).mean())
        share = float(np.mean([np.isin(t, i).mean() for t, i in zip(truth_Q10, ids_Q10, strict=True)]))
        found |= {f"qps_{nprobe}": options.queries / seconds, f"r1_{nprobe}": 100 * first, f"r10_{nprobe}": 100 * share}
        points.add(share, seconds, f"{nprobe}")
    optimal = points.optimal_pts
    for at in range(optimal.size()):
        if optimal.at(at).key:
            found[f"optimal_{optimal.at(at).key}"] = 1.0
    return found


def _ours(blocks: list[tuple[int, faiss.Index]], stored: Stored, queries_QD: NDArray[np.float32]) -> NDArray[np.int64]:
    scores = np.full((len(queries_QD), 10), -np.inf)
    ids = np.full((len(queries_QD), 10), -1, dtype=np.int64)
    for first, index in blocks:
        rows_ND = stored.rows_ND[first : first + index.ntotal]

        def rows_of(at: NDArray[np.int64], rows_ND: NDArray[np.float32] = rows_ND) -> NDArray[np.float32]:
            return rows_ND[at]

        found = search_index(index.search, index.ntotal, queries_QD, 10, rows_of, shortlist=SHORTLIST)
        both = np.concatenate([scores, found[0]], axis=1), np.concatenate([ids, found[1] + first], axis=1)
        scores, ids = best(*both, 10)
    return ids


class Stored:
    """Descriptors in a mapped file."""

    def __init__(self, rows_ND: NDArray[np.float32]) -> None:
        self.rows_ND = rows_ND

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows, a block at a time."""
        for first in range(0, len(self.rows_ND), PER_BLOCK):
            yield first, np.asarray(self.rows_ND[first : first + PER_BLOCK])

    def forget(self) -> None:
        """Its pages in memory, which a first reading counts again."""
        mapped = self.rows_ND.base
        assert isinstance(mapped, mmap.mmap)
        mapped.madvise(mmap.MADV_DONTNEED)

    def sample(self, wanted: int) -> NDArray[np.float32]:
        """Rows evenly spread over all."""
        return np.asarray(self.rows_ND[spread(len(self.rows_ND), wanted)])


class Mixture:
    """Unit descriptors around centres, with one covariance scaled for each, in blocks that are drawn one by one."""

    def __init__(
        self,
        centres_CD: NDArray[np.float32],
        spread_C: NDArray[np.float32],
        share_C: NDArray[np.float64],
        shape_DD: NDArray[np.float32],
    ) -> None:
        self.centres_CD, self.spread_C, self.share_C, self.shape_DD = centres_CD, spread_C, share_C, shape_DD

    @classmethod
    def of(cls, options: Options) -> Mixture:
        """Fitted on an index's descriptors, or on clusters of clusters; their size brought to the one asked for."""
        rng = np.random.default_rng(0)
        if options.descriptors:
            from eval.index.index import Index

            real_ND = Index.open(options.descriptors).features.descriptors()
        else:
            coarse = rng.standard_normal((32, options.size)) * 2
            fine = coarse[rng.integers(0, 32, 4096)] + rng.standard_normal((4096, options.size))
            real_ND = fine.astype(np.float32)
        if real_ND.shape[1] != options.size:
            turn = np.linalg.qr(rng.standard_normal((max(real_ND.shape[1], options.size),) * 2))[0]
            real_ND = (real_ND @ turn[: real_ND.shape[1], : options.size]).astype(np.float32)
        real_ND = real_ND / np.linalg.norm(real_ND, axis=1, keepdims=True)
        clusters = max(1, min(options.clusters, len(real_ND) // 4))
        kmeans = faiss.Kmeans(options.size, clusters, niter=10, seed=1, min_points_per_centroid=1)
        kmeans.train(real_ND)
        centres_CD = np.asarray(kmeans.centroids, dtype=np.float32)
        nearest = faiss.knn(real_ND, centres_CD, 1)[1][:, 0]
        share_C = np.bincount(nearest, minlength=clusters).astype(np.float64)
        away_N = np.linalg.norm(real_ND - centres_CD[nearest], axis=1)
        spread_C = np.array([away_N[nearest == c].mean() if share_C[c] else 0.0 for c in range(clusters)])
        away_ND = real_ND - centres_CD[nearest]
        variance_D, axes_DD = np.linalg.eigh(away_ND.T.astype(np.float64) @ away_ND)
        variance_D = np.maximum(variance_D, 0)
        shape_DD = (axes_DD * np.sqrt(variance_D / variance_D.sum())).T.astype(np.float32)  # a row's length is 1 or so
        return cls(centres_CD, spread_C.astype(np.float32), share_C / share_C.sum(), shape_DD)

    def draw(self, seed: int, count: int) -> NDArray[np.float32]:
        """`count` descriptors."""
        rng = np.random.default_rng(seed + 1)
        of = rng.choice(len(self.share_C), count, p=self.share_C)
        rows_ND = rng.standard_normal((count, self.centres_CD.shape[1]), dtype=np.float32)
        rows_ND = rows_ND @ self.shape_DD
        rows_ND *= self.spread_C[of, None]
        rows_ND += self.centres_CD[of]
        rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
        return rows_ND

    def blocks(self, count: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """`count` rows, a block at a time."""
        for first in range(0, count, PER_BLOCK):
            yield first, self.draw(first // PER_BLOCK, min(PER_BLOCK, count - first))


def _stored_bytes(index: faiss.Index) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index"
        faiss.write_index(index, str(file))
        return file.stat().st_size


def _growth(options: Options, figures: dict[str, float]) -> dict[str, float]:
    """The exponent of build time and of time per query in the number of rows, by least squares on logarithms."""
    if len(options.rows) < 2:
        return {}
    logs = np.log(np.array(options.rows, dtype=np.float64))
    nprobe = options.nprobe[-1]
    seconds = {
        "build": [figures[f"ours_{n}_build_s"] for n in options.rows],
        "query": [1 / figures[f"ours_{n}_qps_{nprobe}"] for n in options.rows],
        "exact_query": [1 / figures[f"exact_{n}_qps"] for n in options.rows],
    }
    found = {f"growth_{what}": float(np.polyfit(logs, np.log(values), 1)[0]) for what, values in seconds.items()}
    print("growth, exponent of the rows: " + ", ".join(f"{what} {value:.2f}" for what, value in found.items()))
    return found


def _on_paper(options: Options, figures: dict[str, float]) -> None:
    """Memory, nodes and hours of building 10^8 and 10^9, from the bytes and seconds at the largest size.

    Hours are of this machine: training as at the largest size, with as many lists, and filling in proportion to the
    rows. Blocks are independent, so nodes divide the filling.
    """
    largest = max(options.rows)
    per_image = figures[f"ours_{largest}_bytes_per_image"]
    rows = []
    for count in (10**8, 10**9):
        index_gb, exact_gb = count * per_image / 1e9, count * 4.0 * options.size / 1e9
        nodes = [f"{math.ceil(gb / NODE_GB)}" for gb in (index_gb, exact_gb)]
        training = figures[f"ours_{largest}_train_s"]
        hours = f"{(training + (figures[f'ours_{largest}_build_s'] - training) * count / largest) / 3600:,.1f}"
        rows.append([f"{count:.0e}", f"{index_gb:,.0f}", nodes[0], f"{exact_gb:,.0f}", nodes[1], hours])
    columns = ["photographs", "approximate, GB", "nodes", "descriptors, GB", "nodes if held in memory", "build, h"]
    print_table(f"On paper, nodes of {NODE_GB:g} GB", columns, rows)


if __name__ == "__main__":
    main()
