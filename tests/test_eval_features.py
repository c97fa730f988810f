"""Facets, compact local features, shards on disk: what is stored, what is refused, what an interrupted run redoes."""

from __future__ import annotations

import itertools
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
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from configs.schema import DataConfig, EvalConfig, ModelConfig, RerankConfig
from data_pipeline.folder_lock import FolderLock, LockedError
from data_pipeline.images import decode
from eval.benchmarks.benchmark import Benchmark, make_benchmark
from eval.benchmarks.ground_truth import frames_within
from eval.evaluate import FirstStage, check_depth, evaluate, precision_of
from eval.extract import extract, fit_projection
from eval.feature_cache import FeatureCache
from eval.features import FeatureError, StoredFeatures, map_shard, open_folder, shard_bounds, shard_is_whole, shard_path
from eval.local_features import NO_CELL, compact, min_max, pca_basis, random_basis, read_local, salient
from eval.pixels import as_trained, input_size, load_image, pixel_differences, pixel_rule
from eval.verify_features import verify_features
from model.facets import FACETS, log_bin
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


def log_bin_by_loops(local_BNC: torch.Tensor, grid: tuple[int, int], hierarchy: int) -> torch.Tensor:
    rows, columns = grid
    maps = local_BNC.reshape(len(local_BNC), rows, columns, -1)
    out = []
    for y in range(rows):
        for x in range(columns):
            parts = [maps[:, y, x]]
            for k in range(hierarchy):
                reach, half = 3**k, 3**k // 2
                for dy in (-reach, 0, reach):
                    for dx in (-reach, 0, reach):
                        if dy or dx:
                            i, j = min(max(y + dy, 0), rows - 1), min(max(x + dx, 0), columns - 1)
                            window = maps[:, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
                            parts.append(window.mean(dim=(1, 2)))
            out.append(torch.cat(parts, dim=-1))
    return F.normalize(torch.stack(out, dim=1), dim=-1)


@pytest.mark.parametrize(("grid", "hierarchy"), [((6, 5), 1), ((6, 5), 2), ((1, 4), 2), ((7, 8), 3)])
def test_log_binning_equals_loops(grid: tuple[int, int], hierarchy: int) -> None:
    local = torch.randn(2, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(1))
    binned = log_bin(local, grid, hierarchy)
    assert binned.shape[2] == 3 * (1 + 8 * hierarchy)
    torch.testing.assert_close(binned, log_bin_by_loops(local, grid, hierarchy))


@pytest.mark.parametrize("facet", FACETS)
@pytest.mark.parametrize("include_cls", [False, True])
def test_every_facet_at_every_layer(model: PlaceModel, facet: str, include_cls: bool) -> None:
    inputs = torch.randn(2, 3, 56, 42, generator=torch.Generator().manual_seed(2))
    seen = []
    for layer in range(len(model.backbone.blocks)):
        config = RerankConfig(facet=facet, layer=layer, include_cls=include_cls)
        with torch.inference_mode():
            descriptor_BD, local_BNC, saliency_BN = read_local(model, inputs, config)
        assert local_BNC.shape == (2, 12 + include_cls, 12 if facet == "attn" else 128)
        assert saliency_BN.shape == (2, 12)
        torch.testing.assert_close(local_BNC.norm(dim=2), torch.ones(2, 12 + include_cls))
        torch.testing.assert_close(descriptor_BD, model(inputs))
        seen.append(local_BNC)
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_attention_facet_and_softmax_saliency_are_rows_of_the_attention(model: PlaceModel) -> None:
    inputs = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(3))
    caught: list[torch.Tensor] = []
    block = model.backbone.blocks[1]
    handle = block.attn.qkv.register_forward_hook(lambda *args: caught.append(args[2]))
    with torch.inference_mode():
        config = RerankConfig(facet="attn", layer=1, saliency_layer=1, saliency="softmax", include_cls=True)
        _, local_BNC, saliency_BN = read_local(model, inputs, config)
        _, _, logits_BN = read_local(model, inputs, RerankConfig(saliency_layer=1))
    handle.remove()
    heads, width = block.attn.num_heads, caught[0].shape[2] // 3
    q, k = (caught[0][0, :, i * width : (i + 1) * width].unflatten(1, (heads, -1)) for i in (0, 1))
    attention = torch.stack([(q[:, h] @ k[:, h].T * block.attn.scale).softmax(1) for h in range(heads)]).mean(0)
    torch.testing.assert_close(local_BNC[0], F.normalize(attention[:, 1:], dim=1))
    torch.testing.assert_close(saliency_BN[0], attention[0, 1:])
    logits = torch.stack([q[0, h] @ k[1:, h].T * block.attn.scale for h in range(heads)]).mean(0)
    torch.testing.assert_close(logits_BN[0], logits)


def test_saliency_is_scaled_in_each_image_and_a_constant_map_is_no_division_by_zero() -> None:
    saliency = torch.tensor([[-4.0, 0.0, -2.0], [10.0, 20.0, 12.9], [3.0, 3.0, 3.0]])
    assert salient(saliency, 0.3).tolist() == [[False, True, True], [False, True, False], [False] * 3]
    assert salient(saliency, None).all()
    assert min_max(saliency)[0].tolist() == [0.0, 1.0, 0.5]


def test_compact_keeps_salient_patches_their_cells_and_their_values() -> None:
    g = torch.Generator().manual_seed(4)
    local = F.normalize(torch.randn(3, 13, 32, generator=g), dim=2)
    saliency = torch.rand(3, 12, generator=g)
    for kind, tolerance in (("fp16", 1e-3), ("int8", 6e-3)):
        config = RerankConfig(dtype=kind, saliency_thresh=0.5, include_cls=True)
        kept = compact(local, saliency, (3, 4), config)
        values = kept.codes_PC.float() * kept.scale_P[:, None]
        keep = min_max(saliency) > 0.5
        assert kept.count_I.tolist() == (1 + keep.sum(dim=1)).tolist()
        assert kept.cell_P2[0].tolist() == [NO_CELL, NO_CELL]
        torch.testing.assert_close(values[1 : kept.count_I[0]], local[0, 1:][keep[0]], rtol=0, atol=tolerance)
        cells = torch.nonzero(keep[0].reshape(3, 4)).tolist()
        assert kept.cell_P2[1 : kept.count_I[0]].tolist() == cells
    assert kept.codes_PC.dtype == torch.int8


def test_pca_keeps_inner_products_and_both_bases_are_orthonormal() -> None:
    g = torch.Generator().manual_seed(6)
    flat = F.normalize(torch.randn(500, 5, generator=g) @ torch.randn(5, 40, generator=g), dim=1)
    basis = pca_basis(flat, 5)
    torch.testing.assert_close((flat @ basis) @ (flat @ basis).T, flat @ flat.T, rtol=1e-4, atol=1e-4)
    for one in (basis, random_basis(40, 12)):
        torch.testing.assert_close(one.T @ one, torch.eye(one.shape[1]), rtol=1e-4, atol=1e-5)
    assert torch.equal(random_basis(40, 12), random_basis(40, 12))


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


def test_shards_are_a_matter_of_the_images_alone() -> None:
    for count, batch in ((0, 4), (1, 4), (200, 32), (10_000, 32), (3_000_000, 32)):
        bounds = shard_bounds(count, batch)
        assert [i for first, stop in bounds[:3] for i in (first, stop)][:1] == ([0] if count else [])
        assert sum(stop - first for first, stop in bounds) == count
        assert all(stop - first <= 1024 for first, stop in bounds)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))


def test_features_of_other_weights_and_damaged_ones_are_refused_in_one_line(tmp_path: Path) -> None:
    open_folder(tmp_path, {"key": "abc", "images": 5})
    open_folder(tmp_path, {"key": "abc", "images": 5})
    with pytest.raises(FeatureError, match=r"holds features of other key .abc, asked for xyz"):
        open_folder(tmp_path, {"key": "xyz", "images": 5})
    shard_path(tmp_path, 0).write_bytes(b"nonsense")
    with pytest.raises(FeatureError, match=r"features-000000\.safetensors: not a whole shard of features; remove it"):
        shard_is_whole(shard_path(tmp_path, 0), "abc", 5)
    assert not shard_is_whole(shard_path(tmp_path, 1), "abc", 5)


def flip_sign_bits(path: Path, name: str, element: int, count: int) -> None:
    """Flips the highest bit of some numbers of a tensor in a safetensors file."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    size = {"F32": 4, "F16": 2, "U8": 1, "I64": 8}[entry["dtype"]]
    start = 8 + length + entry["data_offsets"][0]
    for i in range(element, element + count):
        data[start + (i + 1) * size - 1] ^= 0x80
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["descriptors", "codes", "cell", "saliency", "count", "crc32", "scale"])
def test_a_flipped_bit_in_stored_features_is_found_where_it_is_read_and_by_verify(tmp_path: Path, name: str) -> None:
    images = [torch.randn(n, 4) for n in (5, 3, 4, 6, 2)]
    folder = tmp_path / "kept" / "abc"
    stored = store(folder, images)
    assert verify_features(tmp_path / "kept") == []
    damaged = shard_path(folder, 1)
    flip_sign_bits(damaged, name, 0, 1)

    def read() -> None:
        again = StoredFeatures(folder, stored.bounds)
        again.descriptors()
        again.patches(np.arange(5), CPU)

    with pytest.raises(FeatureError) as error:
        read()
    said = ": not a whole shard of features" if name == "count" else " is damaged"  # a count below 0 has no place
    assert str(error.value).startswith(f"feature shard {damaged}{said}")
    assert "\n" not in str(error.value)
    assert verify_features(tmp_path / "kept") == verify_features(folder) != []
    (line,) = verify_features(folder)
    assert str(damaged) in line
    if name not in ("codes", "cell", "saliency", "scale"):  # what a search reads is found when a run opens it
        with pytest.raises(FeatureError, match=said):
            shard_is_whole(damaged, "test", 2)
    assert shard_is_whole(shard_path(folder, 0), "test", 3)


def test_what_is_read_of_sound_features_is_what_was_written(tmp_path: Path) -> None:
    images = [torch.randn(n, 4) for n in (5, 0, 4)]
    patches = store(tmp_path, images).patches(np.array([2, 1, 0, 2]), torch.device("cpu"))
    assert patches.count_B.tolist() == [4, 0, 5, 4]
    assert torch.equal(patches.codes_BMC[2, :5], images[0].half().float())


def test_features_without_a_digest_are_not_used(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    save_file({"descriptors": torch.zeros(2, 4)}, path, metadata={"key": "abc"})
    with pytest.raises(FeatureError, match="it has no digest"):
        shard_is_whole(path, "abc", 2)


@pytest.mark.usefixtures("single_process")
def test_two_extractions_do_not_write_to_one_folder(tmp_path: Path, model: PlaceModel) -> None:
    write_photos(tmp_path / "photos", 3, ((60, 40),))
    paths = sorted((tmp_path / "photos").glob("*.jpg"))
    with FolderLock(tmp_path / "kept", "another evaluation"), pytest.raises(LockedError, match="another evaluation"):
        extract(model, paths, _config(), tmp_path / "kept", key="abc")
    extract(model, paths, _config(), tmp_path / "kept", key="abc")
    with FolderLock(tmp_path / "kept", "another evaluation"):
        assert len(extract(model, paths, _config(), tmp_path / "kept", key="abc")) == 3  # complete: it only reads


def _config(**changes: object) -> EvalConfig:
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
    _config(),
    _config(resize="aspect", rerank={"dtype": "int8", "project": "pca", "project_size": 16}),
    _config(resize="native", rerank={"when": "auto", "geometry": "translation", "score": "similarity_sum"}),
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
        config = _config(precision="bf16", faiss_index="HNSW8", rerank={"project": "random", "project_size": 8})
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

        one = evaluate(model, first, _config(), note_down, cache)
        assert len(cache.held) == 1
        extracted = len([note for note in notes if note.startswith("features")])
        two = evaluate(model, second, _config(), note_down, cache)
        again = len([note for note in notes if note.startswith("features")]) - extracted
        assert again < extracted
        assert not cache.held
        np.testing.assert_array_equal(one.predictions_QK[:5], two.predictions_QK)


def check_kept_features_are_used_again_and_other_weights_are_not_mistaken_for_them() -> None:
    model = build_model(TINY).eval()
    with shared_folder() as folder:
        benchmark, config = _benchmark(folder), _config(features=str(folder / "kept"))
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
    check_depth([benchmark], _config(recall_at=[1, 21]))
    with pytest.raises(ValueError, match="recall_at 30: photos has 21 database images; use at most 21"):
        check_depth([benchmark], _config(recall_at=[1, 30]))


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
        basis = fit_projection(model, paths, _config(rerank={"project": "pca", "project_size": 9}))
        assert basis is not None
        everyone = [torch.empty_like(basis) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, basis)
        assert all(torch.equal(basis, other) for other in everyone)
        with pytest.raises(ValueError, match="project_size 500 exceeds the 128 channels"):
            fit_projection(model, paths, _config(rerank={"project": "pca", "project_size": 500}))


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
            extract(build_model(TINY).eval(), benchmark.database, _config(), folder / "features", key="k")
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
        _config(),
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
