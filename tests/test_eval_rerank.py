"""Mutual nearest neighbours against plain loops, masks by candidate, ties, and the same ranking at any world size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval.rerank
from configs.schema import RerankConfig
from eval.extract import Features, salient, slice_bounds
from eval.rerank import match_scores, reorder, rerank
from tests.ranks import on_ranks


def _features(count: int, patches: int, size: int, seed: int, spread: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 local features of images that share patches, and random masks."""
    g = torch.Generator().manual_seed(seed)
    shared_NC = torch.randn(patches, size, generator=torch.Generator().manual_seed(0))
    local = torch.stack([shared_NC[torch.randperm(patches, generator=g)] for _ in range(count)])
    local = F.normalize(local + spread * torch.randn(local.shape, generator=g), dim=-1).half()
    return local, torch.rand(count, patches, generator=g) > 0.4


def _naive(
    query_NC: torch.Tensor, query_mask: torch.Tensor, cand_NC: torch.Tensor, cand_mask: torch.Tensor, thresh: float
) -> tuple[int, float]:
    sim = (query_NC.double() @ cand_NC.double().T).tolist()
    count, total = 0, 0.0
    for i, row in enumerate(sim):
        j = row.index(max(row))
        column = [other[j] for other in sim]
        if column.index(max(column)) == i and row[j] > thresh and query_mask[i] and cand_mask[j]:
            count, total = count + 1, total + row[j]
    return count, total


@pytest.mark.parametrize(("patches", "size", "candidates"), [(17, 24, 5), (9, 7, 1), (30, 40, 11)])
@pytest.mark.parametrize("thresh", [0.65, 0.3])
def test_scores_equal_plain_loops(patches: int, size: int, candidates: int, thresh: float) -> None:
    (query,), (query_mask,) = _features(1, patches, size, 1)
    cands, masks = _features(candidates, patches, size, 2)
    expected = [_naive(query, query_mask, c, m, thresh) for c, m in zip(cands, masks, strict=True)]
    assert max(count for count, _ in expected) > 0
    counts = match_scores(query, query_mask, cands, masks, nn_match_thresh=thresh)
    sums = match_scores(query, query_mask, cands, masks, nn_match_thresh=thresh, score="similarity")
    assert counts.tolist() == [count for count, _ in expected]
    torch.testing.assert_close(sums, torch.tensor([total for _, total in expected]), rtol=1e-5, atol=1e-5)


def test_blocks_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    (query,), (query_mask,) = _features(1, 19, 24, 3)
    cands, masks = _features(13, 19, 24, 4)
    whole = match_scores(query, query_mask, cands, masks, nn_match_thresh=0.5)
    monkeypatch.setattr(eval.rerank, "SIMILARITIES_PER_BLOCK", 4 * 19 * 19)
    assert torch.equal(match_scores(query, query_mask, cands, masks, nn_match_thresh=0.5), whole)


def test_each_candidate_has_its_own_mask() -> None:
    """The union of the candidates' masks, the original's fault, would give both candidates every patch."""
    (query,), _ = _features(1, 16, 24, 5)
    cands = query.expand(2, -1, -1).contiguous()
    everything, masks = torch.ones(16, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, :5] = masks[1, 5:8] = True
    assert match_scores(query, everything, cands, masks, nn_match_thresh=0.65).tolist() == [5, 3]


def test_neighbours_are_sought_among_all_patches_not_only_salient_ones() -> None:
    query = torch.eye(2, 3)
    cand = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.0, 0.4]]), dim=-1)[None]
    # The nearest patch of query patch 0 is patch 0, which is not salient; patch 1 is near enough but not the nearest.
    both, second = torch.tensor([True, True]), torch.tensor([[False, True]])
    assert match_scores(query, both, cand, second, nn_match_thresh=0.65).tolist() == [0]


def test_saliency_is_scaled_in_each_image_and_a_constant_map_is_no_division_by_zero() -> None:
    saliency = torch.tensor([[-4.0, 0.0, -2.0], [10.0, 20.0, 12.9], [3.0, 3.0, 3.0]])
    assert salient(saliency, 0.3).tolist() == [[False, True, True], [False, True, False], [False] * 3]
    assert salient(saliency, None).all()


def test_ties_keep_the_order_of_retrieval_and_the_rest_stays_behind() -> None:
    ids = np.array([[7, 3, 9, 1, 5, 0]])
    cosine = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]], dtype=np.float32)
    scores = np.array([[2, 5, 2, 5]], dtype=np.float32)
    ranked = reorder(scores, ids, cosine, num_patches=10, global_weight=0.0)
    assert ranked.tolist() == [[3, 1, 7, 9, 5, 0]]
    ranked = reorder(np.full((1, 4), 4, np.float32), ids, cosine, num_patches=10, global_weight=0.0)
    assert ranked.tolist() == ids.tolist()


def test_global_weight_adds_the_cosine_to_the_share_of_matches() -> None:
    ids = np.array([[4, 2, 8]])
    cosine = np.array([[0.9, 0.5, 0.1]], dtype=np.float32)
    scores = np.array([[0, 3, 6]], dtype=np.float32)  # 0, 0.3 and 0.6 of the patches
    assert reorder(scores, ids, cosine, num_patches=10, global_weight=0.5).tolist() == [[8, 2, 4]]  # .45 .55 .65
    assert reorder(scores, ids, cosine, num_patches=10, global_weight=2.0).tolist() == [[4, 2, 8]]  # 1.8 1.3 0.8


def check_ranking_equals_the_single_process() -> None:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    for num_database, num_queries, config in (
        (23, 37, RerankConfig(top_k=6, nn_match_thresh=0.5)),
        (23, 5, RerankConfig(top_k=50, nn_match_thresh=0.5, score="similarity", global_weight=0.3)),
        (3, 1, RerankConfig(top_k=2, nn_match_thresh=0.5)),
    ):
        cands, cand_masks = _features(num_database, 18, 24, seed=num_database)
        queries, query_masks = _features(num_queries, 18, 24, seed=100 + num_queries)

        def mine(local: torch.Tensor, masks: torch.Tensor) -> Features:
            start, stop = slice_bounds(len(local), rank, world)
            return Features(start, torch.zeros(stop - start, 4), local[start:stop], masks[start:stop])

        order = np.random.default_rng(num_queries)
        ids_QK = np.stack([order.permutation(num_database) for _ in range(num_queries)])
        cosine_QK = -np.sort(-order.random((num_queries, num_database)).astype(np.float32), axis=1)
        ranked, scores = rerank(mine(queries, query_masks), mine(cands, cand_masks), ids_QK, cosine_QK, config)
        expected = np.zeros_like(scores)
        for q, row in enumerate(ids_QK[:, : config.top_k]):
            for t, i in enumerate(row):
                pair = _naive(queries[q], query_masks[q], cands[i], cand_masks[i], config.nn_match_thresh)
                expected[q, t] = pair[config.score == "similarity"]
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
        again = reorder(expected, ids_QK, cosine_QK, num_patches=18, global_weight=config.global_weight)
        np.testing.assert_array_equal(ranked, again)


test_on_ranks = on_ranks(__file__)
