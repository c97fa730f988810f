"""Search over ranks equals one flat index, ties included; recall@K."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmarks import Benchmark
from eval.extract import slice_bounds
from eval.recall import recall_at
from eval.search import gather_slices, search_ranks, search_rows
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
    start, stop = slice_bounds(len(rows_ND), rank, world)
    scores, ids = search_ranks(torch.from_numpy(queries_QD), torch.from_numpy(rows_ND[start:stop]), start, k)
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


def check_gather_slices_of_odd_and_empty_ranks() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for count in (0, 1, 3, 11):
        whole = torch.arange(2.0 * count).reshape(count, 2)
        bounds = [slice_bounds(count, r, world) for r in range(world)]
        mine = whole[slice(*bounds[rank])]
        assert torch.equal(gather_slices(mine, [stop - start for start, stop in bounds]), whole)


def test_ids_of_one_flat_index() -> None:
    rows_ND, queries_QD = _unit(501, 64, 20), _unit(45, 64, 21)
    index = faiss.IndexFlatIP(64)
    index.add(rows_ND)
    flat_scores, flat_ids = index.search(queries_QD, 10)
    scores, ids = search_rows(queries_QD, rows_ND, 10)
    np.testing.assert_array_equal(ids, flat_ids)
    np.testing.assert_allclose(scores, flat_scores, rtol=0, atol=1e-6)


@given(count=st.integers(0, 1000), world=st.integers(1, 70))
def test_slices_cover_everything_once_and_evenly(count: int, world: int) -> None:
    bounds = [slice_bounds(count, rank, world) for rank in range(world)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


def _benchmark(positives: list[list[int]]) -> Benchmark:
    offsets = np.cumsum([0, *map(len, positives)]).astype(np.int64)
    return Benchmark("x", "x", [], [], offsets, np.array([i for ids in positives for i in ids], dtype=np.int64))


@settings(max_examples=60, deadline=None)
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


test_on_ranks = on_ranks(__file__)
