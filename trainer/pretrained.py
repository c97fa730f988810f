"""What `rerankvpr.load` takes: a run, a checkpoint, an exported file, a model in MLflow, published weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HfHubHTTPError

from configs.load import check_network, load_stored_recipe
from configs.names import nearest
from configs.plugins import load_plugins
from configs.reading import reason
from configs.registry import BACKBONES
from configs.schema import ModelConfig, Recipe
from eval.describer import Describer
from eval.weights_file import describer_of, describer_of_file
from model.network import build_model
from trainer.checkpoint import load_model_weights
from trainer.checkpoint_folder import find_checkpoint
from trainer.published import is_ours
from trainer.recorded_plugins import note_checkpoint

MLFLOW = re.compile(r"(models|runs|mlflow-artifacts|m-\w+):/")
WEIGHTS = (".safetensors", ".pth", ".pt")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
GRAPHS = {".onnx": "onnxruntime.InferenceSession", ".pt2": "torch.export.load"}


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    plugins: Sequence[str] = (),
    **settings: Any,
) -> Describer:
    """A network for use, from wherever it is; see `rerankvpr.load`."""
    load_plugins(plugins)
    where = None if device is None else torch.device(device)
    text, path = str(source), Path(source)
    if isinstance(source, str) and MLFLOW.match(text):
        return _of_mlflow_folder(_downloaded(text), text, where, settings)
    if path.suffix in GRAPHS:
        raise ValueError(f"{text} is a graph without local features; {GRAPHS[path.suffix]} opens it")
    if path.is_file() and path.suffix in WEIGHTS:
        return describer_of_file(path, device=where, **settings)
    if (path / "MLmodel").is_file():
        return _of_mlflow_folder(path, text, where, settings)
    if path.is_dir() and is_ours(path):
        return describer_of_file(path / SAFETENSORS_SINGLE_FILE, device=where, **settings)
    if path.exists():
        return _of_checkpoint(find_checkpoint(path), where, settings)
    if text in BACKBONES:
        model = ModelConfig.model_validate({"backbone": text, "weights": "timm", "finetune_last_n_blocks": 0})
        return describer_of(build_model(model), Recipe(model=model), text, device=where, **settings)
    if isinstance(source, str) and REPOSITORY.fullmatch(text):
        return describer_of_file(_of_hub(text), device=where, **settings)
    known = nearest(text, BACKBONES.names())
    raise FileNotFoundError(
        f"{text}: no such file or folder; expected a run, a checkpoint, an exported file, a model in MLflow "
        f"(models:/NAME/VERSION), a repository of the hub (OWNER/NAME), or a backbone; {known}"
    )


def _of_checkpoint(checkpoint: Path, device: torch.device | None, settings: dict[str, Any]) -> Describer:
    note_checkpoint(checkpoint)  # explains names that only a plug-in knows
    recipe = load_stored_recipe(checkpoint / "recipe.yaml")
    check_network(recipe, checkpoint / "recipe.yaml")
    model = build_model(recipe.model.model_copy(update={"weights": "random"}), seed=recipe.seed)
    load_model_weights(model, checkpoint)
    return describer_of(model, recipe, str(checkpoint), device=device, **settings)


def _of_hub(repository: str) -> Path:
    """The weights of a repository of the Hugging Face hub, downloaded once into the hub's cache."""
    try:
        return Path(hf_hub_download(repository, SAFETENSORS_SINGLE_FILE))
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{repository}: no such file or folder, and the Hugging Face hub does not give it ({reason(error)})"
        ) from error


def _downloaded(uri: str) -> Path:
    """The folder of a logged model, from the store of MLFLOW_TRACKING_URI."""
    from trainer.mlflow_store import quiet_mlflow

    quiet_mlflow(retries=2)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return Path(mlflow.artifacts.download_artifacts(uri))
    except MlflowException as error:
        store = mlflow.get_tracking_uri()
        raise ValueError(
            f"{uri}: MLflow's store {store} does not give it ({reason(error)}); MLFLOW_TRACKING_URI names the store"
        ) from error


def _of_mlflow_folder(folder: Path, source: str, device: torch.device | None, settings: dict[str, Any]) -> Describer:
    """The network of a logged model; none of the code that is stored with it is run."""
    files = sorted((folder / "artifacts").glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(f"{source}: a model in MLflow with {len(files)} safetensors files; ours have one")
    found = describer_of_file(files[0], device=device, **settings)
    found.source = source
    return found
