"""Exports in the programs that they are for: each gives the engine's own descriptors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import rerankvpr
from configs.files import write_whole
from configs.schema import Recipe
from data_pipeline.images import normalise
from launch.export_command import main as export
from tests.checkpoints import write_checkpoint
from tests.photos import jpeg
from trainer.graph import load_graph

ROOT = Path(__file__).resolve().parent.parent
SIDE = 42
RECIPE = Recipe.model_validate(
    {
        "model": {"backbone": "tiny14", "weights": "random", "aggregator": "gem"},
        "data": {"image_size": SIDE, "shards": "sets/city"},
        "eval": {"image_size": SIDE},
    }
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with results of its last checkpoint."""
    folder = tmp_path_factory.mktemp("exports") / "run"
    checkpoint, _ = write_checkpoint(folder, RECIPE)
    result = {"name": "town", "protocol": "25 m radius", "recall": {"1": 61.25}, "recall_reranked": {"1": 70.5}}
    write_whole(folder / "results.json", json.dumps({"model": str(checkpoint), "results": [result]}))
    return folder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Five images of the network's size."""
    return torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def expected(run: Path, images: torch.Tensor) -> np.ndarray:
    return rerankvpr.load(run, device="cpu").describe(images)


def exported(run: Path, out: Path, *flags: str) -> Path:
    assert export([str(run), str(out), *flags]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("takes", ["uint8", "float"])
def test_a_pt2_file_gives_the_engines_descriptors(
    run: Path, images: torch.Tensor, expected: np.ndarray, takes: str, tmp_path: Path
) -> None:
    """For any number of images; float32 in another order of sums."""
    file = exported(run, tmp_path / "net.pt2", "--input", takes)
    given = images if takes == "uint8" else normalise(images)
    graph = load_graph(file)
    for count in (1, 2, 5):
        np.testing.assert_allclose(graph(given[:count]), expected[:count], atol=2e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt2", "net.pt2.md"]
    program = torch.export.load(file)
    assert not [node for node in program.graph.nodes if "upsample" in str(node.target)]  # positions are a constant
    with pytest.raises(Exception, match=r"(?i)shape|size"):  # of another size: refused, not wrong
        graph(torch.zeros(1, 3, SIDE + 14, SIDE, dtype=given.dtype))


@pytest.mark.slow
def test_an_onnx_file_stands_alone_and_gives_the_engines_descriptors(run: Path, tmp_path: Path) -> None:
    """onnxruntime in a process without torch reads it; its positions are constants, its batch is of any size."""
    import onnx

    file = exported(run, tmp_path / "net.onnx", "--image-size", "28", "56")
    images = torch.randint(0, 256, (5, 3, 28, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        network = rerankvpr.load(run, device="cpu").model
        expected = network(normalise(images)).numpy()
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        "import sys, numpy as np, onnxruntime as o; s = o.InferenceSession(sys.argv[1]); x = np.load(sys.argv[2]); "
        "d = [s.run(None, {'images': x[:n]})[0] for n in (1, 5)]; assert 'torch' not in sys.modules; "
        "assert np.allclose(d[0], d[1][:1], atol=1e-6); np.save(sys.argv[3], d[1])"
    )
    names = [file, tmp_path / "images.npy", tmp_path / "found.npy"]
    subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    found = np.load(tmp_path / "found.npy")
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (found * expected).sum(axis=1).min() > 1 - 1e-4
    model = onnx.load(file)
    assert not {node.op_type for node in model.graph.node} & {"Resize", "Upsample"}
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["input"] == "images [batch, 3, 28, 56]: uint8 RGB, 0 to 255; the graph normalises"
    assert [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == ["batch", 128]


def test_a_folder_for_the_hub_is_loaded_by_from_pretrained(
    run: Path, images: torch.Tensor, expected: np.ndarray, tmp_path: Path
) -> None:
    folder = exported(run, tmp_path / "net")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    network = rerankvpr.PublishedNetwork.from_pretrained(str(folder))
    with torch.inference_mode():
        assert np.array_equal(network(images), expected)
        assert np.array_equal(network(normalise(images)), expected)
    assert network.descriptor_size == expected.shape[1]
    assert np.array_equal(rerankvpr.load(folder, device="cpu").describe(images), expected)
    exported(run, folder)  # its own is replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no export of ours"):
        export([str(run), str(tmp_path / "mine")])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_torch_hub_gives_the_network(
    run: Path, images: torch.Tensor, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkout, and by the road of GitHub, whose download is here already."""
    file = exported(run, tmp_path / "net.safetensors")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "hub").mkdir(parents=True)
    (tmp_path / "home" / "hub" / "owner_rerankvpr_main").symlink_to(ROOT)
    local = torch.hub.load(str(ROOT), "network", source="local", weights=str(file), device="cpu")
    remote = torch.hub.load(
        "owner/rerankvpr:main", "network", weights=str(file), device="cpu", trust_repo=True, skip_validation=True
    )
    with torch.inference_mode():
        for network in (local, remote):
            assert np.array_equal(network(images), expected)
            resized = network(torch.rand(2, 3, 50, 61))
            assert resized.shape == (2, network.descriptor_size)
        as_is = torch.hub.load(str(ROOT), "network", source="local", weights=str(file), device="cpu", resize=False)
        assert np.array_equal(as_is(images), expected)
        with pytest.raises(ValueError, match="sides are multiples of 14"):
            as_is(images[:, :, :40])


def test_a_graph_or_folder_is_made_of_an_exported_file_too(
    run: Path, images: torch.Tensor, expected: np.ndarray, tmp_path: Path
) -> None:
    file = exported(run, tmp_path / "net.safetensors")
    folder = exported(file, tmp_path / "hub")
    assert load_file(folder / "model.safetensors").keys() == load_file(file).keys()
    assert np.array_equal(rerankvpr.load(folder, device="cpu").describe(images), expected)


def test_a_card_says_recipe_data_figures_and_licence(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "net")
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(header)
    assert (about["library_name"], about["license"]) == ("rerankvpr", "apache-2.0")
    (entry,) = about["model-index"][0]["results"]
    assert [metric["value"] for metric in entry["metrics"]] == [61.25, 70.5]
    assert "| town | 25 m radius | re-ranked | R@1 70.5 |" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["model"]["aggregator"] == "gem"
    assert about["tags"][-1] == "dinov2"
    older = run.parent / "older"
    checkpoint, _ = write_checkpoint(older, RECIPE)
    write_whole(older / "results.json", json.dumps({"model": "step-00000900", "results": [{"name": "town"}]}))
    card = Path(f"{exported(checkpoint, tmp_path / 'old.safetensors')}.md").read_text()
    assert "None is known for this checkpoint" in card  # the results are another checkpoint's
    assert "does not say which data" in card


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["RUN", "net.tflite"], "ending '.tflite' is not known; use .safetensors"),
        (["RUN", "net.onnx", "--image-size", "50"], "--image-size: 50 is not a multiple of the patch size 14"),
        (["RUN", "net.onnx", "--image-size", "28", "28", "28"], "expected a side, or height and width"),
        (["bare.safetensors", "net.onnx"], "holds no recipe"),
        (["bare.safetensors", "net.safetensors"], "holds no recipe"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    run: Path, argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, "bare.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        export([str(run) if word == "RUN" else word for word in argv])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bare.safetensors"]


def evaluated_as_vpr_methods_evaluation_does(network: torch.nn.Module, folder: Path, side: int) -> list[float]:
    """Recall@1, 5 by a loop rebuilt from that program's description.

    Images of `database` and `queries`, positions in their names, become tensors from 0 to 1, normalised, then resized;
    descriptors of batches are searched by L2 distance; a query is right if one of its first K lies within 25 m.
    """
    from torchvision import transforms

    to_input = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            transforms.Resize([side, side], antialias=True),
        ]
    )
    descriptors, positions = [], []
    with torch.inference_mode():
        for part in ("database", "queries"):
            paths = sorted((folder / part).glob("*.jpg"))
            batch = torch.stack([to_input(Image.open(path).convert("RGB")) for path in paths])
            descriptors.append(network(batch).numpy())
            positions.append(np.array([path.name.split("@")[1:3] for path in paths], dtype=float))
    distance_QN = ((descriptors[1][:, None] - descriptors[0][None]) ** 2).sum(axis=2)
    metres_QN = np.linalg.norm(positions[1][:, None] - positions[0][None], axis=2)
    order_QN = distance_QN.argsort(axis=1, kind="stable")
    right_QN = np.take_along_axis(metres_QN <= 25, order_QN, axis=1)
    return [float(right_QN[:, :k].any(axis=1).mean() * 100) for k in (1, 5)]


def test_vpr_methods_evaluation_gives_our_recalls(run: Path, tmp_path: Path, single_process: None) -> None:
    """By its road to networks of others, torch.hub, on a folder in the layout that it reads."""
    from eval.benchmarks.load import load_benchmarks
    from eval.evaluate import evaluate

    rng = np.random.default_rng(2)
    folder = tmp_path / "set" / "images" / "test"
    for part in ("database", "queries"):
        (folder / part).mkdir(parents=True)
    for i in range(12):
        place = np.array(Image.open(io.BytesIO(jpeg(rng))).convert("RGB").resize((70, 56)))
        for part, noise in (("database", 0), ("queries", 250)):
            seen = np.clip(place + rng.integers(-noise, noise + 1, place.shape), 0, 255).astype(np.uint8)
            Image.fromarray(seen).save(
                folder / part / f"@{500000 + 100 * i}@4000000@33@T@@@{i}@@@@@@@@.jpg", quality=95
            )
    m = rerankvpr.load(run, device="cpu", recall_at=[1, 5], rerank={"enabled": False}, bootstrap=0)
    (benchmark,) = load_benchmarks([f"folder:{tmp_path / 'set'}"], tmp_path)
    ours = list(evaluate(m.model, benchmark, m.config).retrieved.values.values())
    file = exported(run, tmp_path / "net.safetensors")
    network = torch.hub.load(str(ROOT), "network", source="local", weights=str(file), device="cpu").eval()
    theirs = evaluated_as_vpr_methods_evaluation_does(network, folder, SIDE)
    assert theirs == ours
    assert 0 < ours[0] < 100
