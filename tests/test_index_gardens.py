"""An index of real photographs by real weights finds what an evaluation finds, to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks.load import load_benchmarks
from eval.evaluate import FirstStage, evaluate
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.photo_list import list_source
from tests.test_eval_gardens import photographs
from trainer.pretrained import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_process")]

BENCHMARK = "gardens_point/day_right/night_right/0-19"
QUERIES = 10  # whole batches, as the evaluation reads them


@photographs
def test_candidates_similarities_and_matches_are_those_of_an_evaluation(tmp_path: Path) -> None:
    root = Path(os.environ["RERANKVPR_TEST_DATA"]).resolve()
    describer = load(os.environ["RERANKVPR_TEST_WEIGHTS"], image_size=224, batch_size=10)
    (benchmark,) = load_benchmarks([BENCHMARK], root)
    stages: list[FirstStage] = []
    config = describer.config.model_copy(update={"recall_at": [1, 5], "bootstrap": 0})
    result = evaluate(describer.model, benchmark, config, on_features=stages.append)
    (stage,) = stages
    assert result.reranked_QK is not None
    assert result.matches_QT is not None

    build_index(describer, list_source(BENCHMARK, root), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    depth = result.matches_QT.shape[1]
    places = index.locate(benchmark.queries[:QUERIES], top_k=depth)
    descriptors_QD = np.stack([place.descriptor for place in places if place.descriptor is not None])
    np.testing.assert_array_equal(descriptors_QD, stage.queries.descriptors(0, QUERIES))
    similarities_QK, numbers_QK = index.search(descriptors_QD, depth)
    np.testing.assert_array_equal(numbers_QK, stage.predictions_QK[:QUERIES, :depth])
    np.testing.assert_array_equal(similarities_QK.astype(np.float32), stage.similarities_QK[:QUERIES, :depth])
    found = [[one.number for one in place.candidates] for place in places]
    assert found == result.reranked_QK[:QUERIES, :depth].tolist()
    before = stage.predictions_QK[:QUERIES, :depth].tolist()
    scores_of = [
        dict(zip(*both, strict=True)) for both in zip(before, result.matches_QT[:QUERIES].tolist(), strict=True)
    ]
    for place, score_of in zip(places, scores_of, strict=True):
        assert [one.matches for one in place.candidates] == [score_of[one.number] for one in place.candidates]
    assert any(ids[0] != row[0] for ids, row in zip(found, before, strict=True))  # matching changed the first
