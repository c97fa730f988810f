"""Evaluation from photographs to results: the same on any ranks, features kept and used again, what is refused."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from configs.schema import DataConfig, EvalConfig, ModelConfig, RerankConfig
from data_pipeline.images import decode
from eval.benchmarks.benchmark import Benchmark, make_benchmark
from eval.benchmarks.ground_truth import frames_within
from eval.evaluate import FirstStage, check_depth, evaluate, precision_of
from eval.extract import extract, fit_projection
from eval.feature_cache import FeatureCache
from eval.features import map_shard
from eval.pixels import as_trained, input_size, load_image, pixel_differences, pixel_rule
from model.network import PlaceModel, build_model
from tests.forked import ROOT, Command
from tests.ranks import on_ranks
from tests.stored import shared_folder, store

CPU = torch.device("cpu")
TINY = ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=0)


@pytest.fixture(scope="module")
def model() -> PlaceModel:
    return build_model(TINY).eval()


def write_photos(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((60, 40),)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        paths.append(folder / f"{i:03d}.jpg")
        coarse.resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC).save(paths[-1], quality=92)
    return paths


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (300, 300), (100, 2000)])
def test_aspect_is_kept_at_the_area_of_the_square(height: int, width: int, patch: int) -> None:
    tall, wide = input_size(height, width, EvalConfig(image_size=224, resize="aspect"), patch)
    assert tall % patch == wide % patch == 0
    assert tall * wide == pytest.approx(224 * 224, rel=0.15)
    assert tall / wide == pytest.approx(height / width, rel=0.15)
    assert input_size(height, width, EvalConfig(image_size=224), patch) == (224, 224)
    own = input_size(height, width, EvalConfig(resize="native"), patch)
    near = zip(own, (height, width), strict=True)
    assert all(side % patch == 0 and abs(side - side_of) <= patch // 2 for side, side_of in near)


def test_an_image_with_more_patches_than_a_byte_counts_is_named(tmp_path: Path) -> None:
    Image.new("L", (30, 3600)).save(tmp_path / "tower.png")
    assert load_image(tmp_path / "tower.png", EvalConfig(resize="aspect"), 14).shape[1] < 3600
    with pytest.raises(ValueError, match=r"tower\.png: 28 x 3598 pixels, at most 3556 a side; use eval.resize aspect"):
        load_image(tmp_path / "tower.png", EvalConfig(resize="native"), 14)
    assert load_image(tmp_path / "tower.png", EvalConfig(resize="native"), 16).shape[1:] == (3600, 32)


def eval_config(**changes: object) -> EvalConfig:
    rerank = RerankConfig.model_validate({"top_k": 4, "nn_match_thresh": 0.3, **changes.pop("rerank", {})})  # type: ignore[dict-item]
    return EvalConfig.model_validate(
        {"image_size": 42, "batch_size": 4, "recall_at": [1, 3], "bootstrap": 50, **changes, "rerank": rerank}
    )


def _benchmark(folder: Path) -> Benchmark:
    sizes = ((60, 40), (40, 60), (50, 50))
    if dist.get_rank() == 0 and not (folder / "queries").exists():
        write_photos(folder / "database", 21, sizes)
        write_photos(folder / "queries", 10, sizes)
    dist.barrier()
    paths = [sorted((folder / part).glob("*.jpg")) for part in ("database", "queries")]
    return make_benchmark("photos", "+-1", *paths, frames_within(10, 21, 1, step=2))


SAME_AT_ANY_SIZE = (
    eval_config(),
    eval_config(resize="aspect", rerank={"dtype": "int8", "project": "pca", "project_size": 16}),
    eval_config(resize="native", rerank={"when": "auto", "geometry": "translation", "score": "similarity_sum"}),
    eval_config(rerank={"when": "adaptive", "match_weight": "saliency", "top_k": 6}),
)


@pytest.mark.slow
def test_results_are_the_same_at_any_number_of_ranks(tmp_path: Path) -> None:
    """Groups of 1, 2 and 4 processes: ids and scores of the search bit by bit, re-ranked ids, recalls."""
    sizes = ((60, 40), (40, 60), (50, 50))
    write_photos(tmp_path / "database", 21, sizes)
    write_photos(tmp_path / "queries", 10, sizes)
    command = ("tests.test_eval_features", "said", str(tmp_path))
    for world in (1, 2, 4):
        ranks = [Command(ROOT, *command, str(rank), str(world)) for rank in range(world)]
        assert [process.wait(timeout=400) for process in ranks] == [0] * world, ranks[0].output()
    said = {(r, w): json.loads((tmp_path / f"{r}of{w}.json").read_text()) for w in (1, 2, 4) for r in range(w)}
    assert len(said[0, 1]) == len(SAME_AT_ANY_SIZE)
    for (rank, world), one in said.items():
        assert one == said[0, 1], f"rank {rank} of {world}"


def _said_main(folder: Path, rank: int, world: int) -> None:
    model, benchmark, said = build_model(TINY).eval(), _benchmark(folder), []
    for config in SAME_AT_ANY_SIZE:
        found: list[FirstStage] = []
        result = evaluate(model, benchmark, config, on_features=found.append)
        scores = [stage.similarities_QK.tolist() for stage in found]
        assert result.reranked_QK is not None
        assert result.gain
        assert result.kb_local_per_image > 0
        assert set(result.timings) >= {"extraction_s_per_image", "retrieval_s_per_query", "rerank_s_per_query"}
        recalls = [{k: (f.value, f.interval) for k, f in recall.by_k.items()} for recall in result.stages().values()]
        assert len(recalls) == 3
        said.append([result.predictions_QK.tolist(), scores, result.reranked_QK.tolist(), recalls])
    (folder / f"{rank}of{world}.json").write_text(json.dumps(said))


def check_an_approximate_index_says_how_much_it_found() -> None:
    with shared_folder() as folder:
        config = eval_config(precision="bf16", faiss_index="HNSW8", rerank={"project": "random", "project_size": 8})
        result = evaluate(build_model(TINY).eval(), _benchmark(folder), config)
        assert result.index_agreement is not None
        assert 50 <= result.index_agreement <= 100


def check_gallery_is_extracted_once_and_let_go_after_its_last_use() -> None:
    model = build_model(TINY).eval()
    with shared_folder() as folder:
        first = _benchmark(folder)
        second = make_benchmark("again", "p", first.database, first.queries[:5], frames_within(5, 21, 1, step=2))
        cache = FeatureCache([first, second])
        notes: list[str] = []

        def note_down(done: int, total: int | None = None, note: str = "") -> None:
            notes.append(f"{note} {done}")

        one = evaluate(model, first, eval_config(), note_down, cache)
        assert len(cache.held) == 1
        extracted = len([note for note in notes if note.startswith("features")])
        two = evaluate(model, second, eval_config(), note_down, cache)
        again = len([note for note in notes if note.startswith("features")]) - extracted
        assert again < extracted
        assert not cache.held
        np.testing.assert_array_equal(one.predictions_QK[:5], two.predictions_QK)


def check_kept_features_are_used_again_and_other_weights_are_not_mistaken_for_them() -> None:
    model = build_model(TINY).eval()
    with shared_folder() as folder:
        benchmark, config = _benchmark(folder), eval_config(features=str(folder / "kept"))
        first = evaluate(model, benchmark, config)
        dist.barrier()
        shards = sorted((folder / "kept").glob("*/*.safetensors"))
        times = [path.stat().st_mtime_ns for path in shards]
        again = evaluate(model, benchmark, config)
        assert [path.stat().st_mtime_ns for path in shards] == times
        np.testing.assert_array_equal(first.reranked_QK, again.reranked_QK)
        dist.barrier()
        other = build_model(TINY, seed=1).eval()
        assert not np.array_equal(evaluate(other, benchmark, config).predictions_QK, first.predictions_QK)
        dist.barrier()
        assert len(sorted((folder / "kept").glob("*/*.safetensors"))) == 2 * len(shards)


def test_the_precision_that_is_told_is_that_of_the_forward_pass() -> None:
    """A network in bf16, as a training holds it, gives bf16 whatever `eval.precision` asks for; autocast is another."""
    model = build_model(TINY).eval()
    asked = {precision: EvalConfig(precision=precision) for precision in ("same", "fp32", "bf16")}
    told = {precision: precision_of(model, config) for precision, config in asked.items()}
    assert told == {"same": "fp32", "fp32": "fp32", "bf16": "bf16 autocast"}
    model.to(torch.bfloat16)
    assert {precision_of(model, config) for config in asked.values()} == {"bf16"}


def test_an_evaluation_sees_the_pixels_of_the_training_unless_told_otherwise(tmp_path: Path) -> None:
    path = write_photos(tmp_path, 1)[0]
    trained = DataConfig(image_size=70, interpolation="bicubic")
    config = as_trained(EvalConfig(image_size=70), trained)
    assert torch.equal(load_image(path, config, 14), decode(path.read_bytes(), 70, "bicubic"))
    assert not torch.equal(load_image(path, config, 14), load_image(path, EvalConfig(image_size=70), 14))
    assert (pixel_rule(config), pixel_differences(config, trained)) == ("70 px square, bicubic", "")
    other = as_trained(EvalConfig(image_size=84, resize="aspect", interpolation="bilinear"), trained)
    assert other.interpolation == "bilinear"
    assert pixel_rule(other) == "area of 84 px squared, bilinear"
    assert pixel_differences(other, trained) == (
        "eval.image_size is 84, trained with 70; eval.resize is aspect, trained with square; "
        "eval.interpolation is bilinear, trained with bicubic"
    )
    wide = load_image(path, other.model_copy(update={"interpolation": "bicubic"}), 14)
    assert wide.shape == load_image(path, other, 14).shape
    assert not torch.equal(wide, load_image(path, other, 14))
    assert pixel_rule(EvalConfig(resize="native")) == "native size, bilinear"


def test_k_beyond_the_database_is_one_line() -> None:
    paths = [Path(f"{i}.jpg") for i in range(21)]
    benchmark = make_benchmark("photos", "+-1", paths, paths[:10], frames_within(10, 21, 1, step=2))
    check_depth([benchmark], eval_config(recall_at=[1, 21]))
    with pytest.raises(ValueError, match="recall_at 30: photos has 21 database images; use at most 21"):
        check_depth([benchmark], eval_config(recall_at=[1, 30]))


def test_settings_that_exclude_each_other_are_refused() -> None:
    for changes, said in (
        ({"resize": "aspect", "rerank": {"facet": "attn"}}, "facet attn has a channel a patch"),
        ({"resize": "native", "rerank": {"facet": "attn"}}, "facet attn has a channel a patch"),
        ({"rerank": {"include_cls": True, "hierarchy": 1}}, "include_cls and hierarchy exclude each other"),
        ({"rerank": {"nn_match_thresh": -0.1}}, "nn_match_thresh"),
    ):
        with pytest.raises(ValueError, match=said):
            EvalConfig.model_validate(changes)


def check_projection_is_one_on_all_ranks_and_no_wider_than_the_facet() -> None:
    model = build_model(TINY).eval()
    with shared_folder() as folder:
        paths = _benchmark(folder).database
        basis = fit_projection(model, paths, eval_config(rerank={"project": "pca", "project_size": 9}))
        assert basis is not None
        everyone = [torch.empty_like(basis) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, basis)
        assert all(torch.equal(basis, other) for other in everyone)
        with pytest.raises(ValueError, match="project_size 500 exceeds the 128 channels"):
            fit_projection(model, paths, eval_config(rerank={"project": "pca", "project_size": 500}))


def check_a_photograph_that_cannot_be_read_ends_all_ranks_by_name() -> None:
    world = dist.get_world_size()
    with shared_folder() as folder:
        benchmark = _benchmark(folder)
        last = benchmark.database[4 * (world - 1) + 2]  # in the first shard of the last rank
        if dist.get_rank() == 0:
            last.write_bytes(b"no photograph")
        dist.barrier()
        said = f"rank {world - 1}: {last}: " if world > 1 else f"{last}: "
        with pytest.raises(ValueError, match=f"^{re.escape(said)}") as caught:
            extract(build_model(TINY).eval(), benchmark.database, eval_config(), folder / "features", key="k")
        assert "\n" not in str(caught.value)
        dist.barrier()


@pytest.mark.slow
def test_a_killed_rank_s_extraction_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Kill -9 of one rank of two; what was finished is neither redone nor changed, the end equals an unbroken run's."""
    write_photos(tmp_path / "photos", 40)

    def start(folder: Path, pause_s: float, world: int, group: str) -> list[Command]:
        command = ["tests.test_eval_features", "extract", str(tmp_path / "photos"), str(folder)]
        about = [str(pause_s), str(tmp_path / group), str(world)]
        return [Command(ROOT, *command, *about, str(rank)) for rank in range(world)]

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    ranks = start(broken, 0.5, 2, "killed")
    deadline = time.monotonic() + 240
    while len(list(broken.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        assert ranks[1].poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGKILL)
    assert ranks[0].wait(timeout=60) != 0  # it does not wait for the dead
    finished = {path: path.stat().st_mtime_ns for path in broken.glob("*.safetensors")}
    assert 3 <= len(finished) < 10
    for folder, world in ((broken, 2), (whole, 1)):
        assert [rank.wait(timeout=240) for rank in start(folder, 0, world, folder.name + "-group")] == [0] * world
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(names) == 10
    for name in names:  # the file's bytes may differ: safetensors writes its metadata in any order
        (one, about), (other, about_other) = map_shard(broken / name), map_shard(whole / name)
        assert about == about_other
        assert {key: (x.dtype, x.shape, x.tobytes()) for key, x in one.items()} == {
            key: (x.dtype, x.shape, x.tobytes()) for key, x in other.items()
        }


test_on_ranks = on_ranks(__file__)


def _extract_main(photos: Path, folder: Path, pause_s: float) -> None:
    extract(
        build_model(TINY).eval(),
        sorted(photos.glob("*.jpg")),
        eval_config(),
        folder,
        key="k",
        on_progress=lambda *_: time.sleep(pause_s),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    if mode == "said":
        rank, world = int(sys.argv[3]), int(sys.argv[4])
        store = dist.FileStore(str(folder / f"store{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        _said_main(folder, rank, world)
    else:
        pause_s, group, world, rank = float(sys.argv[4]), sys.argv[5], int(sys.argv[6]), int(sys.argv[7])
        dist.init_process_group("gloo", store=dist.FileStore(group, world), rank=rank, world_size=world)
        _extract_main(folder, Path(sys.argv[3]), pause_s)
    dist.destroy_process_group()
