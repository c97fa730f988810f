"""`import rerankvpr`: the engine's own numbers, from any source and from images in any form."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rerankvpr
from eval.extract import extract
from eval.given_images import pixels_of
from eval.pairs import Candidates
from eval.pixels import as_trained, load_image
from eval.rerank import score_candidates
from tests.checkpoints import gem_recipe, write_run
from tests.photos import write_jpegs

ROOT = Path(__file__).resolve().parent.parent
RECIPE = gem_recipe(42, data={"interpolation": "bicubic"}, eval={"batch_size": 4})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run."""
    return write_run(tmp_path_factory.mktemp("door"), RECIPE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine JPEGs of odd sizes, some of them grey or progressive."""
    return write_jpegs(tmp_path_factory.mktemp("photos"), 9, seed=3)


@pytest.mark.parametrize("resize", ["square", "aspect"])
def test_descriptors_and_scores_are_those_of_eval(
    run: Path, photos: list[Path], resize: str, single_process: None, tmp_path: Path
) -> None:
    """To the bit: the same pixels in the same batches."""
    m = rerankvpr.load(run, resize=resize, device="cpu")
    config = as_trained(RECIPE.eval.model_copy(update={"resize": resize}), RECIPE.data)
    stored = extract(m.model, photos, config, tmp_path, key="k")
    assert np.array_equal(m.describe(photos), stored.descriptors())
    local = m.local(photos)
    assert [len(image.codes_NC) for image in local] == [int(n) for shard in stored.shards for n in shard["count"]]
    assert np.array_equal(np.stack([image.descriptor_D for image in local]), stored.descriptors())
    candidates_QT = np.array([[1, 2, 0], [3, 8, 1]])
    scores = score_candidates(
        Candidates(stored, np.array([0, 5]), stored, candidates_QT), config.rerank, torch.device("cpu")
    )
    ours = [[m.match(local[a], local[b]).score for b in row] for a, row in zip((0, 5), candidates_QT, strict=True)]
    assert np.array_equal(np.array(ours, np.float32), scores)
    assert scores[0, 0] > 1


def test_a_match_says_where(run: Path, photos: list[Path]) -> None:
    m = rerankvpr.load(run, device="cpu")
    match = m.match(photos[0], photos[0])
    assert match.similarity == pytest.approx(1, abs=1e-6)
    assert match.score == match.agrees_M.sum() == len(match.cosine_M) > 1
    assert np.array_equal(match.points_a_M2, match.points_b_M2)
    width, height = Image.open(photos[0]).size
    columns = {round((i + 0.5) * width / 3, 3) for i in range(3)}
    rows = {round((i + 0.5) * height / 3, 3) for i in range(3)}
    assert {round(float(x), 3) for x in match.points_a_M2[:, 0]} <= columns
    assert {round(float(y), 3) for y in match.points_a_M2[:, 1]} <= rows
    with pytest.raises(ValueError, match="one image on each side, not 2"):
        m.match(photos[:2], photos[0])


def test_images_in_any_form_give_one_descriptor(run: Path, photos: list[Path]) -> None:
    m = rerankvpr.load(run, device="cpu")
    data = photos[1].read_bytes()
    pixels_HW3 = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    forms = [
        photos[1],
        str(photos[1]),
        data,
        memoryview(data),
        pixels_HW3,
        pixels_HW3.transpose(2, 0, 1),
        torch.from_numpy(pixels_HW3).permute(2, 0, 1),
        torch.from_numpy(pixels_HW3),
        torch.from_numpy(pixels_HW3).permute(2, 0, 1) / 255,
        pixels_HW3.astype(np.int64),
        Image.fromarray(pixels_HW3),
    ]
    alone = m.describe(photos[1])
    assert alone.shape == (1, m.descriptor_size)
    assert alone.dtype == np.float32
    for form in forms:
        assert np.array_equal(m.describe(form), alone), type(form)
    everything = m.describe(forms, batch_size=1)
    assert np.array_equal(everything, alone.repeat(len(forms), axis=0))
    batch = torch.from_numpy(pixels_HW3).permute(2, 0, 1).expand(3, -1, -1, -1)
    as_tensor = m.describe(batch, out="torch")
    assert torch.equal(as_tensor, torch.from_numpy(m.describe([pixels_HW3] * 3)))
    grey = np.array(Image.open(photos[1]).convert("L"))
    assert np.array_equal(m.describe(grey), m.describe(np.stack([grey] * 3, axis=2)))
    assert m.describe([]).shape == (0, m.descriptor_size)
    assert m.local([]) == []


@pytest.mark.parametrize("resize", ["square", "aspect", "native"])
def test_pixels_are_those_of_an_evaluation(photos: list[Path], resize: str) -> None:
    config = as_trained(RECIPE.eval.model_copy(update={"resize": resize}), RECIPE.data)
    for path in photos:
        for given in (path, path.read_bytes(), Image.open(path)):
            assert torch.equal(pixels_of(given, config, 14).image_3HW, load_image(path, config, 14))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"no photograph", r"image 1: not a readable image \("),
        (b"", r"image 1: not a readable image \(empty"),
        (torch.randn(3, 8, 8), "floats from 0 to 1 \\(not normalised ones\\)"),
        (np.full((8, 8, 3), 300), "numbers from 300 to 300; expected integers from 0 to 255"),
        (np.full((8, 8, 3), np.nan), "floats from 0 to 1"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\); expected"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (7, "a int; expected a path"),
    ],
)
def test_what_is_no_image_is_named(run: Path, photos: list[Path], image: object, words: str) -> None:
    m = rerankvpr.load(run, device="cpu")
    with pytest.raises(ValueError, match=words):
        m.describe([photos[0], image])  # type: ignore[list-item]


def test_a_missing_file_and_a_text_file_are_named(run: Path, tmp_path: Path) -> None:
    m = rerankvpr.load(run, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        m.describe("nowhere.jpg")
    text = tmp_path / "a.jpg"
    text.write_text("hello")
    with pytest.raises(ValueError, match=re.escape(str(text))):
        m.describe([text])
    with pytest.raises(TypeError, match="images are int"):
        m.describe(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size 0"):
        m.describe([], batch_size=0)


def test_every_source_gives_the_same_network(run: Path, photos: list[Path], tmp_path: Path) -> None:
    from trainer.export import export_network
    from trainer.logged_model import save_pyfunc

    exported = export_network(run / "checkpoints" / "step-00000001", tmp_path / "net.safetensors")
    save_pyfunc(exported.file, exported.recipe, tmp_path / "logged", "run", "m-1")
    expected = rerankvpr.load(str(run), device="cpu").describe(photos)
    for source in (run / "checkpoints" / "latest", exported.file, tmp_path / "logged"):
        assert np.array_equal(rerankvpr.load(source, device="cpu").describe(photos), expected)


@pytest.mark.parametrize(
    ("source", "words"),
    [("vits41", "expected a run, a checkpoint, .* nearest: vits14"), ("net.onnx", "InferenceSession opens it")],
)
def test_a_source_that_is_none_is_one_line(source: str, words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words) as caught:
        rerankvpr.load(source)
    assert "\n" not in str(caught.value)


def test_settings_replace_the_recipes(run: Path) -> None:
    m = rerankvpr.load(run, image_size=56, rerank={"saliency_thresh": None}, device="cpu")
    assert m.pixels == "56 px square, bicubic"
    assert (m.config.rerank.saliency_thresh, m.config.rerank.nn_match_thresh) == (None, 0.2)
    with pytest.raises(ValueError, match="unknown key image_sise; nearest: image_size"):
        rerankvpr.load(run, image_sise=56)


def test_importing_it_imports_nothing_slow() -> None:
    code = "import sys, rerankvpr; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "yaml", "mlflow", "configs", "model"} & set(done.stdout.split())


def test_a_foreign_package_in_front_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import rerankvpr; rerankvpr.load('x')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: package 'model' should come from")


def test_the_lines_in_the_readme_run_as_written(
    run: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(import rerankvpr\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 10
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    for name, photo in zip(("query.jpg", "left.jpg", "right.jpg"), photos, strict=False):
        (tmp_path / name).symlink_to(photo)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out
