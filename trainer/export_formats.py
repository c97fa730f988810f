"""What `rerankvpr export` writes, by the ending of its name, each with a model card."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from configs.files import partial_of, remove, remove_abandoned, write_whole
from configs.reading import reading
from configs.schema import Recipe
from eval.weights_file import recipe_of
from model.network import build_model, meta_model
from trainer.checkpoint_folder import find_checkpoint
from trainer.export import export_network
from trainer.graph import GRAPHS, Takes, check_graph, describe, write_graph
from trainer.model_card import Figures, figures_of, model_card
from trainer.published import CONFIG, config_of, is_ours

WEIGHTS = "model.safetensors"
CARD = "README.md"
FORMATS = ".safetensors (weights), .onnx or .pt2 (a graph of one image size), or no ending (a folder for the hub)"


@dataclass(frozen=True)
class Written:
    """What an export wrote."""

    path: Path
    card: Path
    recipe: Recipe
    numbers: int
    source: Path
    note: str  # what was checked of it


def check_format(out: Path) -> None:
    """Raises ValueError if nothing is written under such a name, or something else is there."""
    if out.suffix not in (".safetensors", *GRAPHS, ""):
        raise ValueError(f"export to {out}: ending {out.suffix!r} is not known; use {FORMATS}")
    if not out.suffix and out.exists() and not is_ours(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"export to {out}: it is there and no export of ours; name a folder that is not there")
    if out.suffix and out.is_dir():
        raise ValueError(f"export to {out}: a folder; name a file, or a folder without {out.suffix}")


def export_as(
    source: Path,
    out: Path,
    *,
    image_size: tuple[int, ...] = (),
    takes: Takes = "uint8",
    on_stage: Callable[[str], None] = lambda _: None,
) -> Written:
    """Exports a checkpoint, or a file that an export wrote, in the format that the name `out` ends in.

    `image_size` and `takes` are of graphs. `on_stage` gets a word on what is done at present. What is written appears
    whole or not at all. Raises ValueError and CheckpointError with what would be right.
    """
    check_format(out)
    with _weights(source, out, on_stage) as (file, recipe, figures, origin):
        with reading(file, "an exported network"), safe_open(file, framework="pt") as content:
            numbers = sum(_count(content.get_slice(key).get_shape()) for key in content.keys())  # noqa: SIM118
        size, note, card = meta_model(recipe.model).descriptor_size, "", Path(f"{out}.md")
        if out.suffix in GRAPHS:
            sides = check_graph(out, recipe, image_size)
            on_stage("tracing the network")
            whole = recipe.model.model_copy(update={"frozen_precision": "same"})
            least = write_graph(build_model(whole), recipe, out, sides, takes)
            about = describe(recipe, sides, takes, size)
            usage = "\n".join([_usage(out), *(f"# {key}: {text}" for key, text in about.items())])
            note = f"{about['input']}; read again, its descriptors have cosine {least:.7f} or more with the network's"
        else:
            usage = _usage(out)
        text = model_card(
            recipe, figures, name=out.stem or out.name, numbers=numbers, usage=usage, descriptor_size=size
        )
        if not out.suffix:
            card = out / CARD
            _write_folder(file, out, {CONFIG: config_of(recipe, size), CARD: text})
        else:
            write_whole(card, text)
    return Written(out, card, recipe, numbers, origin, note)


@contextlib.contextmanager
def _weights(source: Path, out: Path, on_stage: Callable[[str], None]) -> Iterator[tuple[Path, Recipe, Figures, Path]]:
    """The safetensors file that all formats are made of, its recipe, what is known of it, and where it is from.

    It is `out` itself where that is the format; else a temporary one beside it, unless the source is such a file.
    """
    if source.is_file() and source.suffix == ".safetensors":
        recipe = recipe_of(source)
        if recipe is None:
            raise ValueError(f"{source} holds no recipe: a backbone's weights, and no file of `rerankvpr export`")
        if out.suffix == ".safetensors":
            raise ValueError(f"{source} is exported already; copy it")
        yield source, recipe, Figures([], None, ""), source
        return
    checkpoint = find_checkpoint(source)
    on_stage("reading the checkpoint")
    if out.suffix == ".safetensors":
        done = export_network(checkpoint, out)
        yield done.file, done.recipe, figures_of(checkpoint), checkpoint
        return
    remove_abandoned(out)
    scratch = partial_of(out)
    try:
        done = export_network(checkpoint, scratch / WEIGHTS)
        model = done.recipe.model.model_copy(update={"weights": str(done.file)})
        yield done.file, done.recipe.model_copy(update={"model": model}), figures_of(checkpoint), checkpoint
    finally:
        remove(scratch)


def _count(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _write_folder(weights: Path, out: Path, texts: dict[str, str]) -> None:
    """A folder of the weights and some texts, in the place of one that an earlier export wrote."""
    partial, old = partial_of(out), partial_of(out)
    try:
        partial.mkdir(parents=True)
        shutil.copyfile(weights, partial / WEIGHTS)
        for name, text in texts.items():
            (partial / name).write_text(text)
        if out.exists():
            out.rename(old)
        partial.rename(out)
    finally:
        remove(partial)
        remove(old)


def _usage(out: Path) -> str:
    if out.suffix == ".safetensors":
        return f'import rerankvpr\n\nm = rerankvpr.load("{out.name}")\ndescriptors = m.describe(["a.jpg", "b.jpg"])'
    if out.suffix == ".pt2":
        return f'import torch\n\ndescriptors = torch.export.load("{out.name}").module()(images)'
    if out.suffix == ".onnx":
        return (
            f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{out.name}")\n'
            'descriptors = session.run(None, {"images": images})[0]'
        )
    return (
        f'from rerankvpr import PublishedNetwork\n\nnetwork = PublishedNetwork.from_pretrained("{out.name}")\n'
        "descriptors = network(images)  # uint8, or normalised floats, [B, 3, H, W] of any size"
    )
