"""What checkpoints, exports, stored features and logged models keep of plug-ins, and that none of it is run unasked."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

import rerankvpr
from configs import plugins
from configs.load import load_recipe
from configs.plugins import digests_of_network, load_plugins
from configs.registry import NOT_RUN, REGISTRIES
from configs.schema import ModelConfig, Recipe
from eval.features import weights_digest
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.manifest import PLUGINS, IndexFault
from eval.index.photo_list import list_source
from eval.index.verify import verify_index
from launch.cli import main
from model.network import PlaceModel, build_model
from tests.checkpoints import write_checkpoint
from tests.photos import write_noise_benchmark
from tests.test_plugins import MEAN
from trainer.export import export_network
from trainer.logged_model import save_pyfunc
from trainer.recipe_changes import recipe_changes
from trainer.recorded_plugins import FOLDER, keep_plugins, plugins_of

RECIPE = """
plugins: [my_vpr.py]
output: run
model: {backbone: tiny14, weights: random, aggregator: mean}
data: {image_size: 42}
eval: {image_size: 42}
"""
TRACE = "\nopen('was_run', 'a').write('x')\n"
IMAGES = [np.random.default_rng(4).integers(0, 256, (50, 60, 3), dtype=np.uint8) for _ in range(2)]


def forget() -> None:
    plugins._forget_all_but([[name for name in registry if not registry.origin(name)] for registry in REGISTRIES])
    plugins._loaded.clear()
    NOT_RUN.clear()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, PlaceModel, Recipe]]:
    """A checkpoint of a training with a plug-in's aggregator, whose file leaves a trace where it is run."""
    monkeypatch.chdir(tmp_path)
    Path("my_vpr.py").write_text(MEAN + TRACE)
    Path("recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(Path("recipe.yaml"))
    checkpoint, network = write_checkpoint(Path("run"), recipe)
    keep_plugins(recipe)
    Path("was_run").unlink()
    yield checkpoint, network, recipe
    forget()


def test_nothing_recorded_is_run_unless_it_is_named(
    run: tuple[Path, PlaceModel, Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _, _ = run
    file = Path("network.safetensors")
    export_network(checkpoint, file)
    forget()
    (copy,) = Path("run", FOLDER).glob("*/my_vpr.py")
    with pytest.raises(SystemExit):
        main(["export", "run", "again.safetensors"])
    said = capsys.readouterr()
    assert f"plug-in my_vpr.py, which is code and was not run; --plugins {copy} runs it\n" in said.out
    assert re.fullmatch(rf"rerankvpr: .*unknown model.aggregator 'mean'; .*; --plugins {copy} runs it\n", said.err)
    assert not Path("again.safetensors").exists()
    NOT_RUN.clear()
    for source, where in (("run", checkpoint), (file, file)):
        with pytest.raises(ValueError, match=f"'mean'; .*plug-in my_vpr.py of {where} was not run; --plugins"):
            rerankvpr.load(source, device="cpu")
        NOT_RUN.clear()
    assert not Path("was_run").exists()
    expected = rerankvpr.load("run", device="cpu", plugins=[str(copy)]).describe(IMAGES)
    np.testing.assert_allclose(rerankvpr.load(file, device="cpu").describe(IMAGES), expected, atol=1e-6)
    assert Path("was_run").read_text() == "x"


def test_another_plugin_is_said_when_a_training_resumes(run: tuple[Path, PlaceModel, Recipe]) -> None:
    checkpoint, _, recipe = run
    before = plugins_of(checkpoint)["my_vpr.py"]
    assert recipe_changes(recipe, checkpoint) == {}
    Path("my_vpr.py").write_text(MEAN + "# more\n")
    recipe = load_recipe(Path("recipe.yaml"))
    here = plugins.digests()["my_vpr.py"]
    assert recipe_changes(recipe, checkpoint) == {"plug-in my_vpr.py": f"{before[:8]} -> {here[:8]}"}
    keep_plugins(recipe)
    assert len(list(Path("run", FOLDER).glob("*/my_vpr.py"))) == 2
    without = recipe.model_copy(update={"plugins": []})
    assert recipe_changes(without, checkpoint) == {"plug-in my_vpr.py": f"{before[:8]} -> none"}


def test_features_are_of_a_plugin_too(run: tuple[Path, PlaceModel, Recipe]) -> None:
    _, network, _ = run
    assert set(digests_of_network(network)) == {"my_vpr.py"}
    before = weights_digest(network)
    Path("my_vpr.py").write_text(MEAN + "# more\n")
    load_plugins(["my_vpr.py"])
    after = weights_digest(network)
    forget()
    assert len({before, after, weights_digest(network)}) == 3


def test_an_index_keeps_its_plugin_and_is_of_no_other(
    run: tuple[Path, PlaceModel, Recipe], single_process: None, tmp_path: Path
) -> None:
    write_noise_benchmark(tmp_path)
    photos = list_source(str(tmp_path / "images" / "test" / "database"))
    build_index(rerankvpr.load("run", device="cpu"), photos, Path("index"))
    (copy,) = Path("index", PLUGINS).glob("*/my_vpr.py")
    Path("other.py").write_text(MEAN.replace('"mean"', '"unused"'))
    load_plugins(["other.py"])  # of no part of this network
    expected = Index.open("index", device="cpu").locate(IMAGES[0])[0].candidates
    forget()
    with pytest.raises(IndexFault, match=f"plug-in my_vpr.py, which is code and was not run; --plugins {copy} runs it"):
        Index.open("index")
    assert main(["index", "info", "index"]) == 0
    NOT_RUN.clear()
    Path("my_vpr.py").write_text(MEAN + "# more\n")
    load_plugins(["my_vpr.py"])
    with pytest.raises(
        IndexFault, match=r"^index was made with another plug-in my_vpr.py .* holds the one to run"
    ) as at:
        Index.open("index")
    assert "\n" not in str(at.value)
    with pytest.raises(IndexFault, match=r"^index was made with another plug-in my_vpr.py"):
        build_index(rerankvpr.load("run", device="cpu"), photos, Path("index"))
    forget()
    load_plugins([str(copy)])
    assert Index.open("index", device="cpu").locate(IMAGES[0])[0].candidates == expected
    assert verify_index(Path("index")) == []


def test_sizes_that_only_a_run_shows_are_one_line(run: tuple[Path, PlaceModel, Recipe]) -> None:
    """A plug-in that asks for numbers is not run without memory; a wrong length is refused at the first call."""
    Path("my_vpr.py").write_text(MEAN.replace(".mean(dim=1)", ".mean(dim=1)[:, : 100 + int(tokens_BTC.sum() * 0)]"))
    load_plugins(["my_vpr.py"])
    network = build_model(ModelConfig(backbone="tiny14", weights="random", aggregator="mean"))
    with pytest.raises(ValueError, match=r"^aggregator Mean: descriptors are \(2, 100\); expected \(2, 128\)"):
        network(torch.zeros(2, 3, 28, 28))
    network.backbone.register_forward_hook(lambda _m, _i, tokens: tokens[:, 1:])
    with pytest.raises(ValueError, match=r"^backbone DinoViT: tokens are \(2, 4, 128\); expected \(2, 5, 128\)$"):
        network(torch.zeros(2, 3, 28, 28))


@pytest.mark.slow
def test_a_logged_model_works_elsewhere(run: tuple[Path, PlaceModel, Recipe], tmp_path: Path) -> None:
    checkpoint, _, recipe = run
    expected = rerankvpr.load("run", device="cpu").describe(IMAGES)
    exported = export_network(checkpoint, Path("scratch", "network.safetensors"))
    save_pyfunc(exported.file, recipe, tmp_path / "scratch" / "model", "run", "m-1")
    Path("scratch", "model").rename("model")
    for one in ("my_vpr.py", "run", "scratch"):
        Path(one).rename(f"gone-{one}")
    np.save("images.npy", np.stack(IMAGES))
    code = (
        "import sys, numpy as np, mlflow\n"
        "found = mlflow.pyfunc.load_model('model').predict(np.load('images.npy'))\n"
        "import configs.plugins\n"
        "assert 'model/code' in configs.plugins.__file__, configs.plugins.__file__\n"
        "np.save('found.npy', found)\n"
    )
    elsewhere = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load("found.npy"), expected, atol=1e-6)
    assert mlflow.models.Model.load("model").metadata["descriptor_size"] == 128
