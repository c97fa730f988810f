"""Mutual nearest neighbours against plain loops in float64, ties, margins, and one ranking at any world size."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import RerankConfig
from eval.benchmarks.benchmark import Benchmark
from eval.features import StoredFeatures
from eval.matching import agreeing, match_scores, mutual_matches, pair_bytes, similarities
from eval.pairs import Candidates, plan_batches
from eval.rerank import fuse, margins, patch_counts, patch_mass, reorder, rerank, score_candidates
from eval.sweep import sweep_thresholds
from tests.ranks import on_ranks
from tests.stored import shared_folder, store

CPU = torch.device("cpu")


def brute_force(
    query: torch.Tensor,
    candidate: torch.Tensor,
    thresh: float,
    cells: tuple[torch.Tensor, torch.Tensor] | None = None,
    tolerance: int = 0,
) -> tuple[float, float]:
    """Number of matches and sum of their cosines by plain loops; the first of equally near patches counts."""
    sim = (query.half().double() @ candidate.half().double().T).tolist()
    found: dict[int, tuple[int, float]] = {}
    for i, row in enumerate(sim):
        if not row:
            continue
        j = row.index(max(row))
        if row[j] > thresh and row[j] == max(other[j] for other in sim) and j not in found:
            found[j] = (i, row[j])
    if cells is None:
        return len(found), sum(cos for _, cos in found.values())
    best = (0.0, 0.0)
    shifts = [(*(cells[1][j] - cells[0][i]).tolist(), cos) for j, (i, cos) in found.items()]
    rows, columns = (
        range(
            min((s[axis] for s in shifts), default=0) - tolerance,
            max((s[axis] for s in shifts), default=0) + tolerance + 1,
        )
        for axis in (0, 1)
    )
    for y in rows:
        for x in columns:
            near = [cos for dy, dx, cos in shifts if abs(dy - y) <= tolerance and abs(dx - x) <= tolerance]
            best = max(best[0], len(near)), max(best[1], sum(near))
    return best


# Channels are small multiples of 1/4: products and sums are exact in float32, so ties are ties.
vector = st.lists(st.integers(-2, 2).map(lambda x: x / 4), min_size=3, max_size=3)
patches = st.lists(vector, min_size=0, max_size=6).map(lambda rows: torch.tensor(rows).reshape(-1, 3))


@settings(max_examples=60)
@given(
    queries=st.lists(patches, min_size=1, max_size=4),
    database=st.lists(patches, min_size=1, max_size=7),
    thresh=st.sampled_from([0.0, 0.2, 0.35]),
    score=st.sampled_from(["count", "similarity_sum"]),
    geometry=st.sampled_from(["none", "translation"]),
    weight=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_scores_and_order_equal_plain_loops(
    queries: list[torch.Tensor],
    database: list[torch.Tensor],
    thresh: float,
    score: str,
    geometry: str,
    weight: float,
    seed: int,
) -> None:
    """Ragged, empty and single-patch images, duplicates and ties; sums of quarters are exact."""
    rng = np.random.default_rng(seed)
    grids = [[torch.from_numpy(rng.integers(0, 5, (len(x), 2))) for x in images] for images in (queries, database)]
    config = RerankConfig(
        nn_match_thresh=thresh, score=score, geometry=geometry, geometry_cells=1, global_weight=weight
    )
    ids_QK = np.stack([rng.permutation(len(database)) for _ in queries])
    cosine_QK = -np.sort(-rng.integers(0, 3, ids_QK.shape).astype(np.float32) / 4, axis=1)
    with tempfile.TemporaryDirectory() as name:
        stored_q = store(Path(name) / "q", queries, cells=grids[0], shard=2)
        stored_d = store(Path(name) / "d", database, cells=grids[1], shard=3)
        own = stored_q.patches(np.arange(len(queries)), CPU)
        others = stored_d.patches(ids_QK.ravel(), CPU)
        counts = patch_counts(stored_q)
        assert patch_mass(stored_q, config).tolist() == counts.tolist()
    scores_QT = match_scores(own, others, config).numpy()
    expected = np.zeros(ids_QK.shape)
    for q, row in enumerate(ids_QK):
        for t, i in enumerate(row):
            cells = (grids[0][q], grids[1][i]) if geometry == "translation" else None
            pair = brute_force(queries[q], database[i], thresh, cells, tolerance=1)
            expected[q, t] = pair[score == "similarity_sum"]
    np.testing.assert_array_equal(scores_QT, expected)
    if geometry == "translation":
        found = mutual_matches(similarities(own.codes_BMC, others.codes_BMC.unflatten(0, ids_QK.shape)), thresh)
        for q, t in product(range(len(queries)), range(len(database))):
            matched = found.matched_BNT[q, :, t].nonzero().flatten()
            other_X2 = others.cell_BM2[q * len(database) + t, found.nearest_BNT[q, matched, t]]
            cosine_X = found.cosine_BNT[q, matched, t]
            value_X = cosine_X if score == "similarity_sum" else torch.ones_like(cosine_X)
            scoring = agreeing(other_X2 - own.cell_BM2[q, matched], value_X, 1)
            assert value_X[scoring].sum() == expected[q, t]
    ranked = reorder(fuse(scores_QT, cosine_QK, counts, config.global_weight), ids_QK)
    for q, row in enumerate(ranked):
        keys = [
            s / max(1, len(queries[q])) + weight * c if weight else s
            for s, c in zip(expected[q], cosine_QK[q], strict=True)
        ]
        assert row.tolist() == [ids_QK[q][t] for t in sorted(range(len(keys)), key=lambda t: (-keys[t], t))]


def test_each_candidate_has_its_own_patches(tmp_path: Path) -> None:
    """The union of the candidates' masks, the fault of RerankVPR's code, would give both candidates every patch."""
    query = F.normalize(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    stored_q, stored_d = store(tmp_path / "q", [query]), store(tmp_path / "d", [query[:5], query[5:8]])
    scores = match_scores(
        stored_q.patches(np.array([0]), CPU),
        stored_d.patches(np.array([0, 1]), CPU),
        RerankConfig(nn_match_thresh=0.65, score="count", geometry="none"),
    )
    assert scores.tolist() == [[5, 3]]


def test_ties_keep_the_order_of_retrieval_and_the_rest_stays_behind() -> None:
    ids = np.array([[7, 3, 9, 1, 5, 0]])
    cosine, patches_Q = np.array([[0.9, 0.8, 0.7, 0.6]], dtype=np.float32), np.array([10])
    scores = np.array([[2, 5, 2, 5]], dtype=np.float32)
    assert reorder(fuse(scores, cosine, patches_Q, 0.0), ids).tolist() == [[3, 1, 7, 9, 5, 0]]
    assert reorder(fuse(np.full((1, 4), 4, np.float32), cosine, patches_Q, 0.0), ids).tolist() == ids.tolist()


def test_global_weight_adds_the_cosine_to_the_share_of_matches() -> None:
    ids, patches_Q = np.array([[4, 2, 8]]), np.array([10])
    cosine = np.array([[0.9, 0.5, 0.1]], dtype=np.float32)
    scores = np.array([[0, 3, 6]], dtype=np.float32)  # 0, 0.3 and 0.6 of the patches
    assert reorder(fuse(scores, cosine, patches_Q, 0.5), ids).tolist() == [[8, 2, 4]]  # .45 .55 .65
    assert reorder(fuse(scores, cosine, patches_Q, 2.0), ids).tolist() == [[4, 2, 8]]  # 1.8 1.3 0.8


def test_batches_stay_below_the_bound_and_what_cannot_is_said(tmp_path: Path) -> None:
    images = [torch.randn(60, 500) for _ in range(5)]
    features = store(tmp_path, images)
    pair, own = pair_bytes(60, 60, 500), 8 * 60 * 500
    for depth, (name, memory_mb, most_mb) in product(
        (1, 7, 400), (("cuda", 100, 100), ("cuda", 2, 2), ("cpu", 100, 24))
    ):
        plan = plan_batches(features, features, depth, memory_mb, torch.device(name))
        assert plan.queries * (own + plan.candidates * pair) <= most_mb << 20
        assert plan.candidates == depth or plan.queries == 1
    big = store(tmp_path / "big", [torch.zeros(600, 500)])
    with pytest.raises(ValueError, match=r"rerank.memory_mb 1: one pair of images takes .* MB; allow at least \d+"):
        plan_batches(big, big, 1, 1, torch.device("cpu"))


def _photos(count: int, seed: int) -> list[torch.Tensor]:
    """Images that share patches, of odd counts."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(18, 24, generator=torch.Generator().manual_seed(0))
    images = []
    for i in range(count):
        chosen = shared[torch.randperm(18, generator=g)[: (i * 7 + seed) % 19]]
        images.append(F.normalize(chosen + 0.6 * torch.randn(chosen.shape, generator=g), dim=1))
    return images


def check_ranking_equals_the_single_process() -> None:
    with shared_folder() as folder:
        cases = (
            (23, 37, RerankConfig(top_k=6, nn_match_thresh=0.5, global_weight=0.0)),
            (23, 5, RerankConfig(top_k=50, nn_match_thresh=0.5, score="similarity_sum", global_weight=0.3)),
            (3, 1, RerankConfig(top_k=2, nn_match_thresh=0.5, geometry="none")),
            (23, 37, RerankConfig(top_k=9, nn_match_thresh=0.5, memory_mb=1)),
        )
        g = torch.Generator().manual_seed(0)
        for number, (num_database, num_queries, config) in enumerate(cases):
            database, queries = _photos(num_database, 1), _photos(num_queries, 2)
            cells = [[torch.randint(0, 4, (len(x), 2), generator=g) for x in part] for part in (database, queries)]
            if dist.get_rank() == 0:
                store(folder / f"d{number}", database, cells=cells[0])
                store(folder / f"q{number}", queries, cells=cells[1])
            dist.barrier()
            bounds_d, bounds_q = ([(i, min(i + 3, n)) for i in range(0, n, 3)] for n in (num_database, num_queries))
            stored_d = StoredFeatures(folder / f"d{number}", bounds_d)
            stored_q = StoredFeatures(folder / f"q{number}", bounds_q)
            order = np.random.default_rng(num_queries)
            ids_QK = np.stack([order.permutation(num_database) for _ in range(num_queries)])
            cosine_QK = -np.sort(-order.random(ids_QK.shape).astype(np.float32), axis=1)
            found = rerank(stored_q, stored_d, ids_QK, cosine_QK, config, CPU)
            expected = np.zeros_like(found.scores_QT)
            for q, row in enumerate(ids_QK[:, : config.top_k]):
                for t, i in enumerate(row):
                    grids = (cells[1][q], cells[0][i]) if config.geometry == "translation" else None
                    pair = brute_force(queries[q], database[i], config.nn_match_thresh, grids, tolerance=1)
                    expected[q, t] = pair[config.score == "similarity_sum"]
            np.testing.assert_allclose(found.scores_QT, expected, rtol=1e-5, atol=1e-5)
            key = fuse(found.scores_QT, cosine_QK[:, : config.top_k], patch_counts(stored_q), config.global_weight)
            np.testing.assert_array_equal(found.predictions_QK, reorder(key, ids_QK))
            alone = margins(cosine_QK) >= np.median(margins(cosine_QK))
            some = rerank(stored_q, stored_d, ids_QK, cosine_QK, config, CPU, depth_Q=np.where(alone, 0, config.top_k))
            assert some.num_left_alone == alone.sum()
            np.testing.assert_array_equal(some.predictions_QK[alone], ids_QK[alone])
            np.testing.assert_array_equal(some.predictions_QK[~alone], found.predictions_QK[~alone])


def check_sweep_gives_the_scores_of_single_runs() -> None:
    with shared_folder() as folder:
        images, queries = _photos(9, 3), _photos(7, 4)
        g = torch.Generator().manual_seed(0)
        cells = [[torch.randint(0, 5, (len(x), 2), generator=g) for x in part] for part in (images, queries)]
        if dist.get_rank() == 0:
            store(folder / "d", images, cells=cells[0])
            store(folder / "q", queries, cells=cells[1])
        dist.barrier()
        stored_d = StoredFeatures(folder / "d", [(0, 3), (3, 6), (6, 9)])
        stored_q = StoredFeatures(folder / "q", [(0, 3), (3, 6), (6, 7)])
        ids_QT = np.stack([np.random.default_rng(q).permutation(9)[:5] for q in range(7)])
        for config in (
            RerankConfig(saliency_thresh=None, geometry="none", score="similarity_sum"),
            RerankConfig(saliency_thresh=None, geometry="translation", geometry_cells=1),
        ):
            thresholds = {"saliency": (0.0, 0.5), "match": (0.3, 0.5, 0.7)}
            sweep = sweep_thresholds(stored_q, stored_d, ids_QT, config, CPU, **thresholds)
            for m, thresh in enumerate(sweep.match):
                single = config.model_copy(update={"nn_match_thresh": thresh})
                expected = score_candidates(Candidates(stored_q, np.arange(7), stored_d, ids_QT), single, CPU)
                for s in range(2):  # all patches here have saliency 1
                    np.testing.assert_array_equal(sweep.scores_SMQT[s, m], expected)
        benchmark = Benchmark("x", "x", [], [], np.arange(8), np.arange(7) % 9)
        cosine = np.zeros((7, 5), dtype=np.float32)
        assert sweep.recall(benchmark, ids_QT, cosine, 0.0, 1).shape == (2, 3)


test_on_ranks = on_ranks(__file__)
