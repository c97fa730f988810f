"""A checkpoint's network as an MLflow model, loadable by `mlflow.pyfunc.load_model` and nothing else of ours."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from configs.plugins import keep, loaded
from configs.schema import Recipe
from eval.pixels import as_trained, pixel_rule
from model.network import meta_model
from trainer.export import Exported, export_network
from trainer.mlflow_page import LONGEST, NOTE
from trainer.model_card import figures_of, model_card
from trainer.recorded_plugins import note_checkpoint

NAME = "best"
CARD = "README.md"
HOME = Path(__file__).resolve().parent.parent
CODE = ("configs", "data_pipeline", "model", "eval")  # what trainer/descriptor_model.py imports
REQUIREMENTS = (
    *("mlflow", "torch", "torchvision", "timm", "safetensors", "huggingface_hub", "pydantic", "numpy", "pandas"),
    *("pillow", "PyYAML", "torchcodec"),
)
PLUGIN_CODE, PLUGIN_REQUIREMENTS = ("memory",), ("pyarrow",)  # an aggregator's file may hold a loss or a source too
EXAMPLE_SIDE = 64
INPUT = (
    "images of any size, one or a list: file names, bytes of files, these in base64, or RGB numbers [B, H, W, 3] or "
    "[B, 3, H, W] (0 to 255, or floats from 0 to 1); all are resized as in the training"
)


def log_model(
    client: Any,
    run_id: str,
    checkpoint: Path,
    *,
    register_as: str,
    tags: dict[str, str],
    say: Callable[[str], None],
) -> bool:
    """Logs a checkpoint's network as the model `best` of a run, and as a new version of `register_as` unless empty.

    `tags` tell one logged model of a run from another: the model that carries them already is completed, not doubled.
    Returns whether it is logged: a checkpoint that cannot be read is reported and left out. Raises errors of the store.
    """
    experiment = client.get_run(run_id).info.experiment_id
    of_this = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}' AND {of_this}", max_results=1)
    model = found[0] if found else None
    if model is None or model.status != "READY":
        scratch = checkpoint.parent / ".model.partial"  # one name: what a killed process left is replaced
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            model = model or client.create_logged_model(
                experiment, NAME, source_run_id=run_id, tags=tags, model_type="descriptor"
            )
            try:
                note_checkpoint(checkpoint)  # explains names that only a plug-in knows
                exported = export_network(checkpoint, scratch / "network.safetensors")
                save_pyfunc(exported.file, exported.recipe, scratch / "model", run_id, model.model_id)
                card = _card(checkpoint, exported, model.model_id)
                (scratch / "model" / CARD).write_text(card)
            except (OSError, ValueError, SafetensorError) as error:
                say(f"the model of {checkpoint} is not logged: {error}")
                client.finalize_logged_model(model.model_id, "FAILED")
                return False
            client.log_model_artifacts(model.model_id, str(scratch / "model"))
            about = card.partition("\n## Recipe")[0]  # which is a file of the run
            client.set_logged_model_tags(model.model_id, {NOTE: about[:LONGEST]})
            _attach(client, run_id, model.model_id)
            client.finalize_logged_model(model.model_id, "READY")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if register_as:
        _register(client, register_as, run_id, model)
    return True


def _card(checkpoint: Path, exported: Exported, model_id: str) -> str:
    """The model's card as Markdown, without its header in the hub's terms."""
    usage = f'import mlflow\n\nm = mlflow.pyfunc.load_model("models:/{model_id}")\ndescriptors = m.predict(["a.jpg"])'
    size = meta_model(exported.recipe.model).descriptor_size
    text = model_card(
        exported.recipe,
        figures_of(checkpoint),
        name=f"{exported.recipe.name}, {checkpoint.name}",
        numbers=exported.numbers,
        usage=usage,
        descriptor_size=size,
    )
    return text.partition("\n---\n")[2].lstrip()


def save_pyfunc(network: Path, recipe: Recipe, out: Path, run_id: str, model_id: str) -> None:
    """Writes an exported network as an MLflow model folder with its code, signature and an example. No pickle.

    The recipe's plug-ins go with it, as this process has run them, and are run where the model is loaded. The signature
    says what comes out, float32 descriptors [B, D]; what goes in has too many forms for MLflow's types (see `INPUT` and
    `DescriptorModel.predict`), so it stands in the metadata, with the size of the training's images.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    plugins = loaded(recipe.plugins)
    keep(plugins, out.parent / "plugins")
    artifacts = {"network": str(network)} | ({"plugins": str(out.parent / "plugins")} if plugins else {})
    code, requirements = CODE + PLUGIN_CODE * bool(plugins), REQUIREMENTS + PLUGIN_REQUIREMENTS * bool(plugins)
    size = meta_model(recipe.model).descriptor_size
    rule = as_trained(recipe.eval, recipe.data)
    about = {"input": INPUT, "pixels": pixel_rule(rule), "image_size": recipe.data.image_size, "descriptor_size": size}
    rng = np.random.default_rng(0)
    example = rng.integers(0, 256, (1, EXAMPLE_SIDE, EXAMPLE_SIDE, 3), dtype=np.uint8)
    mlflow.pyfunc.save_model(
        out,
        python_model=HOME / "trainer" / "descriptor_model.py",
        artifacts=artifacts,
        code_paths=[str(HOME / name) for name in code],
        signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype("float32"), (-1, size))])),
        input_example=example,
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in requirements],
        mlflow_model=Model(run_id=run_id, model_id=model_id, metadata=about),
    )
    for cache in out.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)


def _attach(client: Any, run_id: str, model_id: str) -> None:
    """Shows the model among the run's."""
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def _register(client: Any, name: str, run_id: str, model: Any) -> None:
    """Makes the model a version of `name`, once."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):  # it exists; another reason is raised by the next call
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    source = model.artifact_location  # models:/<id> would be looked up in MLflow's global store
    if not any(version.source == source for version in versions):
        about = client.get_logged_model(model.model_id).tags.get(NOTE)
        client.create_model_version(name, source=source, run_id=run_id, model_id=model.model_id, description=about)
