"""What a training would refuse is refused before it is queued: by `plan`, and by `submit`, with one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from launch.plan_command import main as plan
from launch.submit import main as submit
from tests.networks import backbone
from tests.photos import jpeg, write_gsv_cities

CITIES = {"Aachen": dict.fromkeys(range(4), 4), "Bergen": dict.fromkeys(range(4), 4)}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a benchmark of noise and weights of another network, with a recipe for the first two."""
    folder = tmp_path_factory.mktemp("workplace")
    write_gsv_cities(folder / "native", CITIES)
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")
    rng = np.random.default_rng(0)
    for part in ("database", "queries"):
        images = folder / "town" / "images" / "test" / part
        images.mkdir(parents=True)
        for i in range(3):
            (images / f"@{500000 + 100 * i}@4000000@33@T@@@{i}@@@@@@@@.jpg").write_bytes(jpeg(rng))
    state = backbone("vits14", "random").state_dict()
    save_file({key: value.clone() for key, value in state.items()}, folder / "vits14.safetensors")
    recipe = {
        "name": "small",
        "output": str(folder / "run"),
        "data": {"shards": str(folder / "shards"), "places_per_batch": 4, "image_size": 28},
        "model": {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 1},
        "eval": {"benchmarks": ["town"], "data_root": str(folder), "image_size": 28, "recall_at": [1]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss.name MultiSimilarityLos", "MultiSimilarityLos"),
        ("--loss.args alfa 2", "alfa"),
        ("--loss.miner MultiSimilarityMinr", "MultiSimilarityMinr"),
        ("--loss.name CosFaceLoss --memory.placement sharded", "CosFaceLoss"),
        ("--eval.benchmarks twon", "unknown benchmark 'twon'; nearest: town"),
        ("--eval.benchmarks msls_val/nonsense", "msls_val takes no options|unknown variant 'nonsense'"),
        ("--eval.rerank.layer 9", "eval.rerank: layer 9: the backbone has"),
        ("--model.weights {folder}/vits14.safetensors", "does not fit the model"),
        ("--model.finetune-last-n-blocks 99", "99"),
        ("--model.finetune-last-n-blocks 0", "no parameter is trained"),
        ("--data.repeat Nowhere 2", "data.repeat names Nowhere"),
        ("--data.places-per-batch 9", "8 places are fewer than data.places_per_batch 9"),
        ("--data.mix {folder}/shards 0.5", "data.mix names"),
        ("--engine.encode-chunks 99", "engine.encode_chunks 99 is more than the 16 images"),
    ],
)
def test_what_a_training_would_refuse_is_refused(
    flags: str, words: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(workplace / "recipe.yaml"), *flags.format(folder=workplace).split()]
    with pytest.raises(ValueError, match=words):
        plan(argv)
    with pytest.raises(ValueError, match=words):
        submit(["--dry-run", "--", "train", *argv])
    assert "#SBATCH" not in capsys.readouterr().out


def test_a_batch_that_the_nodes_cannot_share_is_refused(workplace: Path) -> None:
    argv = ["--dry-run", "--nodes", "3", "--", "train", str(workplace / "recipe.yaml")]
    with pytest.raises(ValueError, match="4 is not divisible by 3 ranks"):
        submit(argv)
    assert submit([*argv[:2], "1-3", *argv[3:]]) == 0  # of a range as many train as the batch is divisible by


def test_a_good_recipe_passes_and_nothing_is_written(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan([str(workplace / "recipe.yaml")]) == 0
    said = capsys.readouterr()
    assert "2 per epoch" in said.out
    assert "not here" not in said.out + said.err
    assert not (workplace / "run").exists()


def test_what_is_not_on_this_machine_is_named(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ["--data.shards", str(tmp_path / "shards"), "--eval.data-root", str(tmp_path)]
    argv = [str(workplace / "recipe.yaml"), *absent, "--model.weights", str(tmp_path / "w.pth")]
    assert plan(argv) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not here: ")]
    assert len(lines) == 3
    assert all(word in " ".join(lines) for word in ("shards", "benchmark town", "w.pth"))
    assert submit(["--dry-run", "--", "train", *argv]) == 0
    assert capsys.readouterr().err.count("not here when it was submitted: ") == 3


def test_damaged_shards_are_refused(workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "shards", tmp_path / "shards")
    (tmp_path / "shards" / "index.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"index\.parquet"):
        plan([str(workplace / "recipe.yaml"), "--data.shards", str(tmp_path / "shards")])
