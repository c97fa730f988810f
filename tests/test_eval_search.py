"""Search over ranks equals one flat index, ties included; recall@K."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eval.approximate import Trained, train_index
from eval.benchmarks.benchmark import Benchmark
from eval.recall import Figure, bootstrap_means, gain_of, recall_at, recall_of
from eval.search import agreement, search_blocks, search_ranks, search_rows
from tests.ranks import on_ranks


def _unit(count: int, size: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _truth(queries_QD: np.ndarray, rows_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All scores in float64, pair by pair, by (score desc, id asc)."""
    scores_QN = np.array([[(q.astype(np.float64) * r).sum() for r in rows_ND.astype(np.float64)] for q in queries_QD])
    scores_QN = np.round(scores_QN, 12)  # equal vectors have equal scores
    ids_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QN, ids_QK, axis=1), ids_QK


def _assert_sharded_equals_single(rows_ND: np.ndarray, queries_QD: np.ndarray, k: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    start, stop = len(rows_ND) * rank // world, len(rows_ND) * (rank + 1) // world
    blocks = [(first, rows_ND[first : min(first + 17, stop)]) for first in range(start, stop, 17)]
    scores, ids = search_ranks(queries_QD, blocks, k)
    single_scores, single_ids = search_rows(queries_QD, rows_ND, k)
    np.testing.assert_array_equal(ids, single_ids)
    np.testing.assert_array_equal(scores, single_scores.astype(np.float32))
    width = min(k, len(rows_ND))
    true_scores, true_ids = _truth(queries_QD, rows_ND, k)
    np.testing.assert_array_equal(ids[:, :width], true_ids)
    np.testing.assert_allclose(scores[:, :width], true_scores, rtol=0, atol=1e-6)
    assert (ids[:, width:] == -1).all()
    everyone = [torch.empty_like(torch.from_numpy(ids)) for _ in range(world)]
    dist.all_gather(everyone, torch.from_numpy(ids))
    assert all(torch.equal(other, everyone[0]) for other in everyone)


def check_random_rows() -> None:
    for num_rows, num_queries, k, seed in ((203, 37, 10, 0), (41, 5, 1, 1), (97, 70, 25, 2)):
        _assert_sharded_equals_single(_unit(num_rows, 33, seed), _unit(num_queries, 33, seed + 50), k)


def check_duplicates_inside_and_across_shards() -> None:
    rows_ND = np.tile(_unit(7, 48, 3), (11, 1))  # each row eleven times, over all shards
    _assert_sharded_equals_single(rows_ND, _unit(9, 48, 4), 13)


def check_tie_at_the_kth_place_wider_than_the_margin() -> None:
    rows_ND = np.concatenate([_unit(60, 24, 5), np.repeat(_unit(1, 24, 6), 90, axis=0), _unit(31, 24, 7)])
    _assert_sharded_equals_single(rows_ND, np.concatenate([rows_ND[60:61], _unit(4, 24, 8)]), 5)


def check_all_rows_equal() -> None:
    _assert_sharded_equals_single(np.repeat(_unit(1, 16, 9), 101, axis=0), _unit(3, 16, 10), 7)


def check_k_beyond_a_shard_and_the_database() -> None:
    _assert_sharded_equals_single(_unit(9, 12, 11), _unit(3, 12, 12), 6)
    _assert_sharded_equals_single(_unit(9, 12, 11), _unit(3, 12, 12), 20)


def check_more_ranks_than_rows() -> None:
    _assert_sharded_equals_single(_unit(1, 12, 13), _unit(3, 12, 14), 1)
    _assert_sharded_equals_single(_unit(3, 12, 13), _unit(1, 12, 14), 2)


def check_indices_of_factory_strings_over_ranks() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    rows_ND, queries_QD = _unit(1200, 16, 30), _unit(11, 16, 31)
    start, stop = len(rows_ND) * rank // world, len(rows_ND) * (rank + 1) // world
    _, exact = search_ranks(queries_QD, [(start, rows_ND[start:stop])], 10)
    for factory, params, least in (("IVF4,Flat", "nprobe=4", 100), ("IVF4,PQ4x4", "nprobe=2", 10), ("HNSW16", "", 80)):
        scores, ids = search_ranks(
            queries_QD, [(start, rows_ND[start:stop])], 10, train_index(factory, params, rows_ND)
        )
        assert agreement(ids, exact) >= least
        np.testing.assert_allclose(scores[:, 0], (queries_QD * rows_ND[ids[:, 0]]).sum(axis=1), atol=1e-6)
        assert (np.diff(scores, axis=1) <= 0).all()


def test_ids_of_one_flat_index() -> None:
    rows_ND, queries_QD = _unit(501, 64, 20), _unit(45, 64, 21)
    index = faiss.IndexFlatIP(64)
    index.add(rows_ND)
    flat_scores, flat_ids = index.search(queries_QD, 10)
    scores, ids = search_rows(queries_QD, rows_ND, 10)
    np.testing.assert_array_equal(ids, flat_ids)
    np.testing.assert_allclose(scores, flat_scores, rtol=0, atol=1e-6)


def test_blocks_equal_one_index_bitwise_with_ties_across_them() -> None:
    rows_ND = np.tile(_unit(31, 24, 22), (5, 1))
    queries_QD = _unit(9, 24, 23)
    whole = search_rows(queries_QD, rows_ND, 12)
    for size in (1, 7, 64):
        blocks = ((first, rows_ND[first : first + size]) for first in range(0, len(rows_ND), size))
        for part, expected in zip(search_blocks(queries_QD, blocks, 12), whole, strict=True):
            np.testing.assert_array_equal(part, expected)


def test_more_ties_than_are_fetched_at_first_go_by_id_and_a_floor_leaves_the_rest_out() -> None:
    rows_ND = np.concatenate([_unit(3, 16, 24), np.tile(_unit(1, 16, 25), (300, 1)), _unit(5, 16, 26)])
    query_QD = rows_ND[[7, 1]]
    scores, ids = search_rows(query_QD, rows_ND, 4)
    assert ids[0].tolist() == [3, 4, 5, 6]
    assert ids[1, 0] == 1
    assert len(set(scores[0].tolist())) == 1
    _, few = search_rows(query_QD, rows_ND, 4, floor_Q=np.array([scores[0, 0], scores[1, 1] + 1e-3]))
    assert few.tolist() == [[3, 4, 5, 6], [1, -1, -1, -1]]


@pytest.mark.parametrize(("factory", "params"), [("IVF9999,Flat", ""), ("Nonsense", ""), ("HNSW8", "nprobe=3")])
def test_indices_that_faiss_refuses_are_named(factory: str, params: str) -> None:
    with pytest.raises(ValueError, match=f"eval.faiss_index '{factory}'") as caught:
        train_index(factory, params, _unit(50, 8, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_bootstrap_equals_resampling_queries_one_by_one(share: float) -> None:
    values = (np.arange(400) < 400 * share).astype(float)
    rng = np.random.default_rng(1)
    plain = np.percentile([values[rng.integers(0, 400, 400)].mean() for _ in range(4000)], [2.5, 97.5])
    np.testing.assert_allclose(bootstrap_means(values, 4000), plain, atol=0.006)


def test_paired_gain_is_surer_than_two_recalls() -> None:
    benchmark = _benchmark([[0]] * 100)
    before = np.array([[0, 1]] * 50 + [[1, 0]] * 50)
    after = np.array([[0, 1]] * 60 + [[1, 0]] * 40)
    gain = gain_of(before, after, benchmark, [1], 4000).by_k[1]
    assert gain.value == pytest.approx(10.0)
    assert gain.interval
    low, high = gain.interval
    assert 4 <= low <= 6
    assert 15 <= high <= 17
    low, high = recall_of(before, benchmark, [1], 4000).intervals[1]
    assert high - low > 18
    assert gain_of(before, before, benchmark, [1], 100).by_k[1] == Figure(0.0, (0.0, 0.0))
    assert not recall_of(before, benchmark, [1], 0).intervals


def _benchmark(positives: list[list[int]]) -> Benchmark:
    offsets = np.cumsum([0, *map(len, positives)]).astype(np.int64)
    return Benchmark("x", "x", [], [], offsets, np.array([i for ids in positives for i in ids], dtype=np.int64))


@settings(max_examples=60)
@given(data=st.data(), num_database=st.integers(1, 15), num_queries=st.integers(1, 8))
def test_recall_counts_all_queries_and_grows_with_k(data: st.DataObject, num_database: int, num_queries: int) -> None:
    database = st.integers(0, num_database - 1)
    positives = [sorted(data.draw(st.sets(database))) for _ in range(num_queries)]
    predictions = np.array([data.draw(st.permutations(range(num_database))) for _ in range(num_queries)])
    ks = list(range(1, num_database + 3))
    recall = recall_at(predictions, _benchmark(positives), ks)
    for k in ks:
        hits = sum(bool(set(row[:k].tolist()) & set(ids)) for row, ids in zip(predictions, positives, strict=True))
        assert recall[k] == pytest.approx(100.0 * hits / num_queries)
    assert list(recall.values()) == sorted(recall.values())
    assert recall[num_database] == pytest.approx(100.0 * sum(map(bool, positives)) / num_queries)


class PretendGpu:
    """Stands in for FAISS on a GPU, with its limits: searches on the CPU, at most 2,048 neighbours."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free_bytes: int = 8 << 30, fails: str = "") -> None:
        self.scratch: list[int] = []
        self.searches = 0
        gpu = self

        class Resources:
            def setTempMemory(self, num_bytes: int) -> None:
                gpu.scratch.append(num_bytes)

        class Copy:
            def __init__(self, index: faiss.Index) -> None:
                self.index = index

            def add(self, rows_ND: NDArray[np.float32]) -> None:
                if fails == "add":
                    raise RuntimeError("Error in virtual void* faiss::gpu: Error: out of memory")
                self.index.add(rows_ND)

            def search(self, queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
                if k > 2048 or fails == "search":
                    raise RuntimeError("Error in faiss::gpu: Error: k is too large")
                gpu.searches += 1
                scores, ids = self.index.search(queries_QD, k)
                return scores, ids

        def to_gpu(_resources: Resources, _device: int, index: faiss.Index) -> Copy:
            if fails == "kind":
                raise RuntimeError("Error in faiss::gpu: Error: This index type is not implemented on GPU.")
            return Copy(index)

        monkeypatch.setattr("eval.search_device.has_gpu", lambda: True)
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 80 << 30))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)


def _trained(factory: str, params: str, rows: np.ndarray) -> Trained | None:
    return None if factory == "Flat" else train_index(factory, params, rows)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_a_gpu_gives_what_the_cpu_gives_and_keeps_no_scratch_memory(
    factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = _unit(3000, 16, 8), _unit(7, 16, 9)
    trained = _trained(factory, "", rows)
    expected = search_blocks(queries, [(0, rows)], 9, trained)
    gpu = PretendGpu(monkeypatch)
    for ours, theirs in zip(search_blocks(queries, [(0, rows)], 9, trained), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert gpu.searches
    assert gpu.scratch == [256 << 20]  # FAISS's own choice is 1.5 GiB, for as long as the process lives


@pytest.mark.parametrize(
    ("factory", "k", "options", "words"),
    [
        ("Flat", 9, {"fails": "add"}, "out of memory"),
        ("Flat", 9, {"fails": "search"}, "k is too large"),
        ("Flat", 9, {"free_bytes": 100 << 20}, "0.1 GB of the GPU are free, the index needs 0.5"),
        ("Flat", 2500, {}, "k 2516 is above 2048"),
        ("HNSW8", 9, {"fails": "kind"}, "not implemented on GPU"),
        ("IVF4,Flat", 2500, {}, "k 2500 is above 2048"),
    ],
)
def test_what_a_gpu_cannot_search_the_cpu_does_and_says_so(
    factory: str, k: int, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = _unit(3000, 16, 8), _unit(7, 16, 9)
    params = "nprobe=4" if factory.startswith("IVF") else ""
    trained = _trained(factory, params, rows)
    expected = search_blocks(queries, [(0, rows)], k, trained)
    PretendGpu(monkeypatch, **options)
    with pytest.warns(RuntimeWarning, match=f"rank 3 searches on the CPU: .*{words}"):
        found = search_blocks(queries, [(0, rows)], k, trained)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


test_on_ranks = on_ranks(__file__)
