"""The model card that lies beside each export: recipe, data, figures and licence, for people and for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.load import recipe_text
from configs.reading import read_regular, shown
from configs.schema import Recipe
from eval.pixels import as_trained, pixel_rule
from model.licences import licence_text

CODE_LICENCE = "MIT"
HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "CC-BY-NC-4.0": "cc-by-nc-4.0"}


@dataclass(frozen=True)
class Figures:
    """What is known of how good a checkpoint is, and what it was trained on."""

    results: list[dict[str, Any]]  # of `results.json`, if that is about this checkpoint
    recall: float | None  # mean first-stage recall at the validation of this step
    dataset: str  # digest of the shard sets


def figures_of(checkpoint: Path) -> Figures:
    """The results in a run's folder that are those of this checkpoint, and what its own state says.

    Damaged files give no figures: a card must not say what nobody measured.
    """
    state = _read(checkpoint / "state.json")
    found = _read(checkpoint.parent.parent / "results.json")
    about_this = Path(str(found.get("model", ""))).name == checkpoint.name
    results = [one for one in found.get("results", []) if isinstance(one, dict)] if about_this else []
    recalls = state.get("recalls")
    recall = recalls.get(str(state.get("step"))) if isinstance(recalls, dict) else None
    return Figures(results, recall, str(state.get("dataset") or ""))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(file))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def model_card(recipe: Recipe, figures: Figures, *, name: str, numbers: int, usage: str, descriptor_size: int) -> str:
    """Markdown with a YAML header in the hub's terms. `usage` are the lines of code that load this export."""
    return "\n".join([_header(recipe, figures, name), *_body(recipe, figures, name, numbers, usage, descriptor_size)])


def _header(recipe: Recipe, figures: Figures, name: str) -> str:
    licence = recipe.model.spec.licence
    known = HUB_LICENCES.get(licence)
    header: dict[str, Any] = {
        "library_name": "rerankvpr",
        "pipeline_tag": "image-feature-extraction",
        "license": known or "other",
        **({} if known else {"license_name": licence}),
        "tags": ["visual-place-recognition", "image-retrieval", *_family(recipe)],
    }
    if results := [entry for one in figures.results if (entry := _entry(one))]:
        header["model-index"] = [{"name": name, "results": results}]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _family(recipe: Recipe) -> list[str]:
    """What the backbone is of, such as dinov2: the module of its network; nothing for a plug-in's."""
    network = recipe.model.spec.network
    return [network.partition(":")[0].rpartition(".")[2]] if isinstance(network, str) else []


def _entry(result: dict[str, Any]) -> dict[str, Any] | None:
    benchmark, recall = result.get("name"), result.get("recall")
    if not (isinstance(benchmark, str) and isinstance(recall, dict)):
        return None
    metrics = [{"type": f"recall@{k}", "value": round(float(value), 2)} for k, value in recall.items()]
    if isinstance(reranked := result.get("recall_reranked"), dict):
        metrics += [
            {"type": f"recall@{k}", "name": f"recall@{k}, re-ranked", "value": round(float(value), 2)}
            for k, value in reranked.items()
        ]
    return {
        "task": {"type": "image-feature-extraction", "name": "visual place recognition"},
        "dataset": {"name": benchmark, "type": benchmark.replace("/", "-")},
        "metrics": metrics,
    }


def _body(recipe: Recipe, figures: Figures, name: str, numbers: int, usage: str, descriptor_size: int) -> Iterable[str]:
    model, data = recipe.model, recipe.data
    yield f"# {name}\n"
    yield (
        f"A network for visual place recognition: {model.backbone} with {model.aggregator}, {numbers / 1e6:.1f} M "
        f"numbers. An image becomes one L2-normalised descriptor of {descriptor_size} numbers; images of one place "
        "have a large inner product.\n"
    )
    yield f"Images: RGB, {pixel_rule(as_trained(recipe.eval, data))}, ImageNet's mean and deviation.\n"
    yield f"## Use\n\n```python\n{usage}\n```\n"
    sets = ", ".join(data.locations.values())
    yield "## Training\n"
    if figures.dataset:
        yield (
            f"Trained on {sets} (digest {figures.dataset}), {data.places_per_batch} places x "
            f"{data.images_per_place} images per step, {data.image_size} px, loss {recipe.loss.name}, queue of "
            f"{recipe.memory.size}.\n"
        )
    else:
        yield "The checkpoint does not say which data it was trained on.\n"
    yield "## Figures\n"
    yield from _figures(figures)
    yield "## Licence\n"
    yield (
        f"The backbone's published weights are under {model.spec.licence}, the code that trained and loads them under "
        f"{CODE_LICENCE}. The licence of the training's photographs may restrict use; this card does not know it.\n"
    )
    if text := licence_text(model.spec):
        yield f"{text}\n"
    yield f"## Recipe\n\n```yaml\n{recipe_text(recipe)}```\n"


def _figures(figures: Figures) -> Iterable[str]:
    if figures.results:
        yield "Recall in %, measured by the training's own evaluation of this checkpoint.\n"
        yield "| benchmark | protocol | stage | recall |\n| --- | --- | --- | --- |"
        for result in figures.results:
            for stage, key in (("retrieved", "recall"), ("re-ranked", "recall_reranked")):
                if isinstance(values := result.get(key), dict):
                    recall = ", ".join(f"R@{k} {float(value):.1f}" for k, value in values.items())
                    yield f"| {shown(result.get('name'))} | {shown(result.get('protocol'))} | {stage} | {recall} |"
        yield ""
    elif figures.recall is not None:
        yield f"Mean first-stage recall of the validation at this step: {figures.recall:.1f} %.\n"
    else:
        yield "None is known for this checkpoint: no evaluation of it lies in its run's folder.\n"
