"""How many candidates are matched: learned on a database, equal at any world size; matches weighted by saliency."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.schema import RerankConfig
from eval.depth import DepthRule, OwnImages, depth_rule, margin_from, margin_rule, match_own_images
from eval.features import StoredFeatures
from eval.matching import match_scores, mutual_matches, similarities
from eval.rerank import fuse, patch_mass, reorder, rerank
from tests.ranks import on_ranks
from tests.stored import shared_folder, store

CPU = torch.device("cpu")


def some_images(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(3 + i % 5, 12, generator=generator), dim=1) for i in range(count)]


def check_a_depth_for_each_query_ranks_as_its_own_prefix_would() -> None:
    config = RerankConfig(top_k=13, nn_match_thresh=0.2, geometry="none")
    depths = np.array([0, 1, 2, 3, 4, 5, 8, 9, 13, 99, 13])
    rng = np.random.default_rng(0)
    ids_QK = np.stack([rng.permutation(17) for _ in depths])
    ids_QK[8, 4] = -1  # an image of the database that could not be read
    cosine_QK = -np.sort(-rng.random(ids_QK.shape).astype(np.float32), axis=1)
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            store(folder / "d", some_images(17, 1))
            store(folder / "q", some_images(len(depths), 2))
        dist.barrier()
        database = StoredFeatures(folder / "d", [(i, min(i + 3, 17)) for i in range(0, 17, 3)])
        queries = StoredFeatures(folder / "q", [(i, min(i + 3, 11)) for i in range(0, 11, 3)])
        full = rerank(queries, database, ids_QK, cosine_QK, config, CPU)
        found = rerank(queries, database, ids_QK, cosine_QK, config, CPU, depth_Q=depths)
    mass = patch_mass(queries, config)
    for q, depth in enumerate(np.minimum(depths, 13)):
        if depth < 2:
            assert found.predictions_QK[q].tolist() == ids_QK[q].tolist()
            assert np.isnan(found.scores_QT[q]).all()
            continue
        np.testing.assert_array_equal(found.scores_QT[q, :depth], full.scores_QT[q, :depth])
        assert np.isnan(found.scores_QT[q, depth:]).all()
        key = fuse(full.scores_QT[[q], :depth], cosine_QK[[q], :depth], mass[[q]], config.global_weight)
        key[np.isnan(key)] = -np.inf
        assert found.predictions_QK[q].tolist() == reorder(key, ids_QK[[q]])[0].tolist()
    assert found.num_left_alone == 2
    assert found.mean_depth == np.mean([0, 0, 2, 3, 4, 5, 8, 9, 13, 13, 13])
    assert (full.num_left_alone, full.mean_depth) == (0, 13)


def check_margin_is_learned_from_the_database_alone() -> None:
    """Forty pairs of images whose patches agree with their descriptors, then ten that contradict them."""
    g = torch.Generator().manual_seed(5)
    base = F.normalize(torch.randn(40, 16, generator=g), dim=1)
    descriptors = F.normalize(torch.cat([base, base + 0.05 * torch.randn(40, 16, generator=g)]), dim=1)
    scenes = [F.normalize(torch.randn(6, 24, generator=g), dim=1) for _ in range(40)]
    with shared_folder() as folder:
        for name, images in (("agree", scenes + scenes), ("contradict", scenes + scenes[::-1])):
            if dist.get_rank() == 0:
                store(folder / name, images, descriptors_ID=descriptors)
            dist.barrier()
            features = StoredFeatures(folder / name, [(i, min(i + 3, 80)) for i in range(0, 80, 3)])
            own = match_own_images(features, RerankConfig(top_k=79, global_weight=0.0), CPU, 1 << 20)
            assert own is not None
            assert own.key_ST.shape == (80, 79)
            rule = depth_rule(own)
            if name == "agree":
                assert margin_rule(own) < 0.5
                assert rule.reach == 0
            else:
                assert margin_rule(own) == np.inf
                assert rule.reach > 0.5
            assert rule.sure == np.median(own.similarities_ST[:, 0].astype(np.float64))


test_on_ranks = on_ranks(__file__)


def test_margin_is_the_least_above_all_that_changed() -> None:
    margin = np.arange(40) / 100
    changed = np.zeros(40, dtype=bool)
    changed[[3, 12]] = True
    assert margin_from(margin, changed) == pytest.approx(0.13)
    changed[30] = True
    assert margin_from(margin, changed) == np.inf  # nine agreeing images teach nothing


def test_the_rule_matches_less_where_the_first_stage_is_sure() -> None:
    rng = np.random.default_rng(1)
    cosine_ST = -np.sort(-rng.random((60, 12)).astype(np.float32), axis=1)
    key_ST = rng.random((60, 12)) + 3 * cosine_ST
    rule = depth_rule(OwnImages(cosine_ST, key_ST))
    depth_S, sure_S = rule.depths(cosine_ST, 12), cosine_ST[:, 0] >= rule.sure
    assert sure_S.sum() == 30
    assert (depth_S[~sure_S] == 12).all()
    assert 1 < depth_S[sure_S].mean() < 12
    inside_S = key_ST.argmax(axis=1) < depth_S
    assert inside_S.mean() >= 0.9  # of the first candidates after matching
    assert not inside_S.all()
    assert rule.depths(cosine_ST, 5).max() == 5
    nothing = np.array([[cosine_ST.max(), -np.inf, -np.inf]], dtype=np.float32)  # two cannot be read
    assert rule.depths(nothing, 3).tolist() == [1]


def test_a_database_too_small_teaches_nothing(tmp_path: Path, single_process: None) -> None:
    few = OwnImages(np.ones((19, 3), np.float32), np.ones((19, 3)))
    features = store(tmp_path, some_images(2, 1))
    assert match_own_images(features, RerankConfig(), CPU, 1 << 20) is None
    for own in (None, few):
        assert depth_rule(own) == DepthRule(np.inf, np.inf)
        assert depth_rule(own).depths(np.ones((2, 9), np.float32), 7).tolist() == [7, 7]
    assert margin_rule(None) == np.inf


@pytest.mark.parametrize("score", ["count", "similarity_sum"])
def test_matches_count_as_much_as_their_patches_are_salient(tmp_path: Path, score: str) -> None:
    generator = torch.Generator().manual_seed(7)
    images = some_images(6, 3)
    saliency = [torch.rand(len(image), generator=generator).half().float() for image in images]
    features = store(tmp_path, images, saliency=saliency)
    config = RerankConfig.model_validate(
        {"nn_match_thresh": 0.1, "geometry": "none", "match_weight": "saliency", "score": score}
    )
    one, others = features.patches(np.array([0]), CPU), features.patches(np.arange(6), CPU)
    found = match_scores(one, others, config)[0]
    matches = mutual_matches(similarities(one.codes_BMC, others.codes_BMC[None]), 0.1)
    for t in range(6):
        total = 0.0
        for n in matches.matched_BNT[0, :, t].nonzero().flatten().tolist():
            m = int(matches.nearest_BNT[0, n, t])
            weight = float(saliency[0][n] * saliency[t][m]) ** 0.5
            total += weight * (float(matches.cosine_BNT[0, n, t]) if score == "similarity_sum" else 1)
        assert found[t].item() == pytest.approx(total, rel=1e-5)
    mass = patch_mass(features, config)
    np.testing.assert_allclose(mass, [part.sum() for part in saliency], rtol=1e-6)
    if score == "count":
        assert found[0].item() == pytest.approx(mass[0], rel=1e-5)  # itself
