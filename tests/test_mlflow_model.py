"""The model that MLflow holds: images in any form, through MLflow's own loader and its scoring server."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

import rerankvpr
from configs.schema import Recipe
from tests.checkpoints import write_checkpoint
from tests.mlflow_server import PATIENCE_S, wait_until
from tests.photos import jpeg
from tests.ports import free_port
from trainer.descriptor_model import SERVED_FOLDER, SERVING
from trainer.export import export_network
from trainer.logged_model import save_pyfunc

RECIPE = Recipe.model_validate(
    {"model": {"backbone": "tiny14", "weights": "random"}, "data": {"image_size": 42}, "eval": {"image_size": 42}}
)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `tracking.log_model` writes it."""
    folder = tmp_path_factory.mktemp("logged")
    checkpoint, _ = write_checkpoint(folder / "run", RECIPE)
    exported = export_network(checkpoint, folder / "network.safetensors")
    save_pyfunc(exported.file, exported.recipe, folder / "model", "run", "m-1")
    return folder / "model"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "left"
    path.write_bytes(jpeg(np.random.default_rng(1)))
    return path


@pytest.fixture(scope="module")
def expected(logged: Path, photo: Path) -> np.ndarray:
    """What the engine says of the photograph."""
    return rerankvpr.load(logged, device="cpu").describe(photo)


def test_it_takes_images_in_any_form(
    logged: Path, photo: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    model = mlflow.pyfunc.load_model(str(logged))
    text = base64.b64encode(photo.read_bytes()).decode()
    pixels_HW3 = np.array(Image.open(photo).convert("RGB"))
    forms: list[Any] = [str(photo), "left", photo.read_bytes(), text, f"data:image/jpeg;base64,{text}", pixels_HW3]
    forms += [pixels_HW3.tolist(), np.array([text]), pd.DataFrame({"image": [text]}), pd.Series([text]), [str(photo)]]
    for form in forms:
        np.testing.assert_allclose(model.predict(form), expected, atol=1e-6)
    assert model.predict([text, str(photo), photo.read_bytes()]).shape == (3, expected.shape[1])
    for wrong, words in (
        ("nowhere.jpg", "nowhere.jpg"),
        (base64.b64encode(b"hello" * 60).decode(), "not a readable image"),
        (pd.DataFrame({"a": [text], "b": [text]}), "2 columns; expected one"),
    ):
        with pytest.raises(MlflowException, match=words):
            model.predict(wrong)


def test_a_server_opens_no_files_but_those_of_its_folder(
    logged: Path, photo: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlflow.pyfunc.load_model(str(logged))
    monkeypatch.setenv(SERVING, "true")
    with pytest.raises(MlflowException, match="this server opens no files"):
        model.predict([str(photo)])
    monkeypatch.setenv(SERVED_FOLDER, str(photo.parent))
    np.testing.assert_allclose(model.predict(["left"]), expected, atol=1e-6)
    (photo.parent / "out").symlink_to(logged)
    for outside in ("../secret.jpg", "/etc/passwd", "out/MLmodel"):
        with pytest.raises(MlflowException, match="not below this server's folder"):
            model.predict([outside])


@pytest.fixture
def server(logged: Path, tmp_path: Path) -> Iterator[str]:
    """The address of `mlflow models serve` with this environment."""
    port = free_port()
    command = ["-m", "mlflow", "models", "serve", "--model-uri", str(logged), "--env-manager", "local"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            with urllib.request.urlopen(f"{address}/ping", timeout=2) as reply:
                return reply.status == 200
        except OSError:
            return False

    try:
        wait_until(answers, PATIENCE_S)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_mlflows_server_answers_a_request_over_loopback(server: str, photo: Path, expected: np.ndarray) -> None:
    text = base64.b64encode(photo.read_bytes()).decode()
    pixels = np.array(Image.open(photo).convert("RGB")).tolist()

    def ask(content: dict[str, Any]) -> np.ndarray:
        body, header = json.dumps(content).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{server}/invocations", body, header)) as reply:
            return np.array(json.load(reply)["predictions"], dtype=np.float32)

    for content in (
        {"inputs": [text]},
        {"instances": [text]},
        {"dataframe_split": {"columns": ["image"], "data": [[text]]}},
        {"inputs": [pixels]},
    ):
        np.testing.assert_allclose(ask(content), expected, atol=1e-6)
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask({"inputs": [str(photo)]})
    assert caught.value.code == 400
    assert "this server opens no files" in caught.value.read().decode()
