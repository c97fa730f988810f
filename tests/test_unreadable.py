"""Damaged photographs of a benchmark: named, counted, never found; a query among them is a miss."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from configs.schema import EvalConfig, ModelConfig
from eval.benchmarks.benchmark import Benchmark, make_benchmark
from eval.benchmarks.ground_truth import frames_within
from eval.evaluate import evaluate
from eval.features import FeatureError, unreadable_in
from eval.report.pictures import draw_pictures
from eval.unreadable import ranked_without, unreadable_note
from model.network import build_model
from tests.ranks import on_ranks
from tests.stored import shared_folder

TINY = ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=0)
DATABASE, QUERIES = 12, 6
CONFIG = EvalConfig.model_validate(
    {
        **{"image_size": 28, "batch_size": 2, "recall_at": [1, 3, 12], "bootstrap": 0, "max_bad": 0.2, "pictures": 6},
        "rerank": {"top_k": 4, "nn_match_thresh": 0.3},
    }
)


def _benchmark(folder: Path) -> Benchmark:
    parts = []
    for name, count in (("database", DATABASE), ("queries", QUERIES)):
        if dist.get_rank() == 0:
            (folder / name).mkdir()
            rng = np.random.default_rng(0)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
                coarse.resize((60, 40), Image.Resampling.BICUBIC).save(folder / name / f"{i:03d}.jpg")
        parts.append([folder / name / f"{i:03d}.jpg" for i in range(count)])
    dist.barrier()
    return make_benchmark("photos", "same number", *parts, frames_within(QUERIES, DATABASE, 0))


def _damage(path: Path, data: bytes) -> None:
    if dist.get_rank() == 0:
        path.write_bytes(data)
    dist.barrier()


def check_damaged_photographs_are_counted_and_never_found() -> None:
    model = build_model(TINY).eval()
    with shared_folder() as folder:
        benchmark = _benchmark(folder)
        whole = evaluate(model, benchmark, CONFIG)
        assert whole.retrieved[1] == 100  # queries 0 to 5 are database images 0 to 5
        _damage(benchmark.queries[1], b"")
        _damage(benchmark.database[2], benchmark.database[2].read_bytes()[:300])
        _damage(benchmark.database[3], b"no photograph")
        kept = CONFIG.model_copy(update={"features": folder / "kept"})
        first, again = evaluate(model, benchmark, kept), evaluate(model, benchmark, kept)
        for result in (first, again):
            (note,) = [note for note in result.notes if "unreadable" in note]
            assert note.startswith(
                "unreadable: 1 of 6 queries, which count as misses; 2 of 12 database images, which cannot be found "
                f"({benchmark.queries[1]}: empty file; {benchmark.database[2]}: "
            )
            assert result.num_queries == QUERIES
            for predictions_QK in (result.predictions_QK, result.reranked_QK):
                assert predictions_QK is not None
                assert predictions_QK.shape == (QUERIES, DATABASE)
                assert (predictions_QK[1] == -1).all()
                assert not np.isin(predictions_QK, [2, 3]).any()
                others = np.delete(np.arange(QUERIES), 1)
                assert (np.sort(predictions_QK[others, :10], axis=1) == np.delete(np.arange(12), [2, 3])).all()
                assert (predictions_QK[others, 10:] == -1).all()
            assert result.retrieved[1] == pytest.approx(100 * 3 / 6)
        assert np.array_equal(first.predictions_QK, again.predictions_QK)
        for query in (0, 4, 5):  # what is left keeps its order
            before = whole.predictions_QK[query]
            assert first.predictions_QK[query, :10].tolist() == before[~np.isin(before, [2, 3])].tolist()
        if dist.get_rank() == 0:
            assert len(draw_pictures(folder / "pictures", benchmark, first, model, CONFIG)) == 2
        dist.barrier()


def check_more_than_max_bad_stop_all_ranks_by_name() -> None:
    with shared_folder() as folder:
        benchmark = _benchmark(folder)
        _damage(benchmark.database[7], b"no photograph")
        config = CONFIG.model_copy(update={"max_bad": 0.001})
        said = f"stopped at 1 unreadable photographs of 18, more than max_bad 0.001 allows; .*{benchmark.database[7]}: "
        with pytest.raises(ValueError, match=said) as caught:
            evaluate(build_model(TINY).eval(), benchmark, config)
        assert "\n" not in str(caught.value)
        dist.barrier()


def check_a_shard_without_one_readable_photograph_is_written() -> None:
    with shared_folder() as folder:
        benchmark = _benchmark(folder)
        for number in (2, 3):  # both images of the second shard
            _damage(benchmark.database[number], b"no photograph")
        config = CONFIG.model_copy(update={"rerank": CONFIG.rerank.model_copy(update={"project": "pca"})})
        config = config.model_copy(update={"rerank": config.rerank.model_copy(update={"project_size": 4})})
        result = evaluate(build_model(TINY).eval(), benchmark, config)
        assert result.reranked_QK is not None
        assert not np.isin(result.reranked_QK, [2, 3]).any()


@pytest.mark.parametrize("said", ["[", '{"a": "x"}', '{"7": "x"}', '{"-1": "x"}', '"x"'])
def test_a_damaged_list_of_unreadable_images_names_its_file(said: str, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=re.escape(str(tmp_path / "features"))):
        unreadable_in(tmp_path / "features", {"unreadable": said}, 7)


def test_rankings_without_unreadable_images_are_cut_alone() -> None:
    predictions_QK, similarities_QK = np.arange(12).reshape(2, 6), np.ones((2, 6), dtype=np.float32)
    found_QK, similar_QK = ranked_without(predictions_QK, similarities_QK, {}, {}, 4)
    assert found_QK.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert similar_QK.shape == (2, 4)
    assert unreadable_note([], [], 6, 2) == ""


test_on_ranks = on_ranks(__file__)
