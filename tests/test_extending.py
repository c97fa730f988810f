"""docs/extending.md: its files are run as they stand there, in a folder of their own, and used at two ranks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import rerankvpr
from configs.load import load_recipe
from configs.plugins import load_plugins, loaded
from configs.registry import BENCHMARKS, REGISTRIES
from configs.schema import LossConfig, MemoryConfig
from eval.benchmarks.catalogue import CATALOGUE
from launch.cli import main
from launch.torchrun import preload
from tests import forked
from tests.test_memory import UNIT, run
from tests.test_plugin_records import forget
from tests.training import ROOT, ForkedRanks, finish, last_checkpoint, logged
from trainer.preflight import check_training

PAGE = ROOT / "docs" / "extending.md"
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
LONGEST = 30


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, photographs of places, and a recipe that names all of them."""
    folder = tmp_path_factory.mktemp("scratch")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    rng = np.random.default_rng(2)

    def photo(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)

    for place in range(8):
        for view in range(4):
            photo(folder / "photos" / f"corner-{place}" / f"{view}.jpeg")
    for name in "abcdefghijkl":
        photo(folder / "by_name" / "database" / f"{name}.jpg")
    for name in "bdx":
        photo(folder / "by_name" / "queries" / f"{name}.jpg")
    recipe = {
        "output": "run",
        "plugins": sorted(name for name in FILES if name != "source.py"),
        "data": {"shards": "shards", "places_per_batch": 4, "images_per_place": 2, "image_size": 28},
        "model": {"backbone": "small14", "weights": "random", "aggregator": "mean_max", "finetune": "all"},
        "memory": {"size": 24, "start_epoch": 0},
        "loss": {"name": "HardestPair", "args": {"margin": 0.2}, "miner": "Within", "miner_args": {"least": -1.0}},
        "engine": {"zero_stage": 1},
        "trainer": {"epochs": 2, "checkpoint_every_steps": 2},
        "eval": {"benchmarks": ["by_name"], "data_root": ".", "image_size": 28, "pictures": 0},
        "tracking": {"enabled": False},
    }
    recipe["model"]["aggregator_args"] = {"size": 40}  # type: ignore[index]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(autouse=True)
def _in_scratch(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(scratch)
    yield
    forget()


def test_each_kind_has_a_short_file_and_the_page_s_files_are_there() -> None:
    added = [plugin.adds for plugin in load_plugins(FILES)]
    assert {one.split()[0] for adds in added for one in adds} == {one.kind for one in REGISTRIES}
    assert {name: len(code.splitlines()) for name, code in FILES.items() if len(code.splitlines()) >= LONGEST} == {}
    named = re.findall(r"`((?:configs|data_pipeline|model|memory|eval)/[\w/]+\.py)`", PAGE.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_page_s_loss_and_miner_are_what_they_say(single_process: None) -> None:
    """Against the hardest pairs of all similarities at once."""
    load_plugins(["loss.py", "miner.py"])
    config = LossConfig(name="HardestPair", args={"margin": 0.3}, miner="Within", miner_args={"least": -1.0})
    place_ids = [0, 0, 1, 1, 2, 2]
    loss, gradient, _ = run(config, UNIT, place_ids, MemoryConfig(size=0))
    similar, ids = UNIT @ UNIT.T, torch.tensor(place_ids)
    same = ids[:, None] == ids
    hardest_negative = similar.masked_fill(same, -9).amax(1)
    hardest_positive = similar.masked_fill(~same | torch.eye(6).bool(), 9).amin(1)
    expected = (hardest_negative - hardest_positive + 0.3).relu().mean()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert gradient.abs().max() > 0


def test_a_fork_server_imports_no_plugin() -> None:
    """Ranks run plug-ins themselves: a server outlives what a file was when it started."""
    recipe = load_recipe(Path("recipe.yaml"))
    assert preload(["train"], recipe) == preload(["train"], recipe.model_copy(update={"plugins": []}))
    assert {plugin.name for plugin in loaded()} == set(FILES) - {"source.py"}


def test_every_benchmark_of_the_catalogue_is_a_name() -> None:
    assert BENCHMARKS.names() == list(CATALOGUE)


@pytest.mark.slow
def test_all_of_them_train_resume_evaluate_and_export(scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks at ZeRO 1 and 3 under the launcher and its fork server, with no edit of ours."""
    assert main(["shard", "folders", "photos", "shards", "--plugins", "source.py", "--suffix", ".jpeg"]) == 0
    assert "8 places, 32 images" in capfd.readouterr().out
    forget()
    launched = ("rerankvpr", "launch", "--nproc-per-node", "2", "--", "train", "recipe.yaml")
    assert "small14, 0.1 M" in finish(forked.Command(scratch, *launched, "--output", "run-1"))
    third = ("--engine.zero-stage", "3", "--output", str(scratch / "run-3"))
    finish(ForkedRanks(scratch, 2, "trainer", "recipe.yaml", *third))
    losses = [[line["train/loss"] for line in logged(scratch / run).values()] for run in ("run-1", "run-3")]
    assert [len(found) for found in losses] == [4, 4]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)  # float32 in another order
    (scratch / "loss.py").write_text(FILES["loss.py"] + "\n# the same, and yet other code\n")
    third = ("--engine.zero-stage", "3", "--output", str(scratch / "run-1"), "--trainer.epochs", "3", "--resume")
    said = finish(ForkedRanks(scratch, 2, "trainer", "recipe.yaml", *third))
    assert re.search(r"resumed with another recipe: .*plug-in loss.py \w{8} -> \w{8}", said), said
    assert len(logged(scratch / "run-1")) == 6
    checkpoint = last_checkpoint(scratch / "run-1")
    assert json.loads((checkpoint / "plugins.json").read_text()).keys() == set(FILES) - {"source.py"}

    named = ["--plugins", "backbone.py", "aggregator.py", "benchmark.py"]
    assert main(["export", str(checkpoint), "network.safetensors", *named]) == 0
    assert main(["eval", "--checkpoint", str(checkpoint), "--out", "result", *named]) == 0
    assert json.loads((scratch / "result" / "results.json").read_text())["results"][0]["name"] == "by_name"
    photos = [scratch / "by_name" / "queries" / f"{name}.jpg" for name in "bd"]
    expected = rerankvpr.load(checkpoint, device="cpu", plugins=named[1:]).describe(photos)
    assert expected.shape == (2, 40)
    np.testing.assert_allclose(
        rerankvpr.load("network.safetensors", device="cpu").describe(photos), expected, atol=1e-6
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            "aggregator.py",
            "output_size = size",
            "output_size = size + 1",
            r"model.aggregator mean_max: descriptors of 2 images are \(2, 40\); expected \(2, 41\)",
        ),
        (
            "aggregator.py",
            "patches_BNC.amax(1)",
            "patches_BNC",
            r"model.aggregator mean_max: /.*/aggregator.py:\d+: RuntimeError",
        ),
        ("aggregator.py", "self.output_size = size", "pass", "model.aggregator mean_max sets no output_size"),
        (
            "aggregator.py",
            "(Aggregator)",
            "(nn.Module)",
            "mean_max: MeanMax is no model.aggregators.aggregator.Aggregator",
        ),
        (
            "backbone.py",
            ".flatten(2)",
            ".flatten(2)[..., 1:]",
            r"model.backbone small14: tokens of 2 images of 56 pixels are \(2, 16, 32\); expected \(2, 17, 32\)",
        ),
        ("loss.py", "return [Term(", "return (Term(", "loss.name HardestPair returned"),
        (
            "library.py",
            "self.margin - distance_AR",
            "self.margn - distance_AR",
            r"loss.name SoftMarginLoss with loss.miner NearMiner, on four .*: /.*/library.py:\d+: AttributeError",
        ),
        ("library.py", "< 1", "< ref_labels", "loss.name SoftMarginLoss with loss.miner NearMiner, on four"),
        ("loss.py", ".relu().sum()", ".relu()", r"total of a Term is a tensor of \(3,\); expected one number"),
        ("loss.py", "tile.negative_AR", "tile.negativ_AR", r"loss.name HardestPair: /.*/loss.py:\d+: AttributeError"),
        (
            "miner.py",
            "return Mined(tile.is_positive_AP.to(negative_AR), negative_AR)",
            "return negative_AR",
            "loss.miner Within returned Tensor; expected Mined",
        ),
        (
            "miner.py",
            "Mined(tile.is_positive_AP.to(negative_AR)",
            "Mined(tile.is_positive_AP",
            r"its positives are a tensor of \(3, 2\); expected floats",
        ),
        ("benchmark.py", "return make_benchmark(", "return dict(a=", "benchmark by_name"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, words: str
) -> None:
    changed = FILES[file].replace(old, new)
    if file == "loss.py" and "(Term(" in new:
        changed = changed.replace("len(positive_A))]", "len(positive_A)))")
    if file == "benchmark.py":
        changed = FILES[file].replace(
            'make_benchmark("by_name", "same name", database, queries, positives)', "positives"
        )
    assert changed != FILES[file]
    (tmp_path / file).write_text(changed)
    content = yaml.safe_load((scratch / "recipe.yaml").read_text())
    if file == "library.py":
        content["loss"] = {"name": "SoftMarginLoss", "miner": "NearMiner"}
    content["plugins"] = [str(tmp_path / name) if name == file else name for name in content["plugins"]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=words) as raised:
        check_training(load_recipe(tmp_path / "recipe.yaml"), 2)
    assert "\n" not in str(raised.value)


def test_a_source_that_gives_no_places_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    words = ["shard", "folders", str(tmp_path / "photos"), str(tmp_path / "out"), "--plugins", "source.py"]
    from launch.data_commands import parse_shard

    with pytest.raises(ValueError, match=r"^shard folders: .*photos: no photographs$"):
        parse_shard(words[1:]).listing()
