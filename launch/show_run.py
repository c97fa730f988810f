"""What `rerankvpr show` draws of a training or an evaluation: negatives, drift, sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.show_flags import ShowCommand
from launch.show_images import one_benchmark

if TYPE_CHECKING:  # help and mistakes should not wait for torch
    import numpy as np
    from numpy.typing import NDArray

    from configs.schema import Recipe
    from eval.sweep import SweptRecall

Draw = Callable[[Path], str]
"""Draws into a file, whose suffix is its format, and returns what to say of it."""


def draws_negatives(asked: ShowCommand) -> Draw:
    """The hardest negatives of a run. Raises ValueError or OSError if it has none."""
    from eval.report.negatives import draw_negatives, read_negatives
    from trainer.negatives import NAME

    run = _run(asked)
    if not (run / NAME).is_file():
        raise ValueError(f"{run}: holds no {NAME}; train with --trainer.log-negatives-every 50, and with a queue")
    table = read_negatives(run / NAME)
    photograph, note = _photographs(_recipe(run))

    def draw(path: Path) -> str:
        steps = table.steps
        title = f"{run.name}: the hardest negatives of its queue at {len(steps)} steps, {steps[0]} to {steps[-1]}"
        pairs = draw_negatives(path, table, photograph, most=asked.most, title=title)
        return f"{len(table.cosine_n)} negatives, {pairs} pairs{note}"

    return draw


def draws_drift(asked: ShowCommand) -> Draw:
    """The drift of a run beside its decay. Raises ValueError or OSError if none was measured."""
    import numpy as np
    import torch

    from eval.report.drift import draw_drift, read_drift
    from memory.decay import half_life, log_weight
    from trainer.metrics_log import NAME

    run = _run(asked)
    drift, memory = read_drift(run / NAME), _recipe(run).memory
    oldest = drift.ages()[-1]
    ages = torch.linspace(0, oldest, min(oldest, 500) + 1, dtype=torch.float64)
    curve_a2 = torch.from_numpy(drift.curve(max(drift.cosine)))
    weights = log_weight(ages, memory, curve_a2).exp().numpy()
    decay = f"exp(-{memory.decay_lambda:g} age)" if memory.decay == "exponential" else "measured, cosine squared"
    half = half_life(memory, curve_a2)

    def draw(path: Path) -> str:
        title = f"{run.name}: drift of the queue, measured at {len(drift.cosine)} steps"
        weights_a2 = np.stack([ages.numpy(), weights], axis=1)
        draw_drift(path, drift, weights_a2, decay=decay, half_life=half, title=title)
        return f"{len(drift.cosine)} measurements, ages to {oldest}"

    return draw


def draws_sweep(asked: ShowCommand) -> Draw:
    """Recall over both thresholds: of an evaluation's files, or of a benchmark that is swept with --model."""
    from eval.report.heat_map import draw_heat_map

    swept = _swept(asked)

    def draw(path: Path) -> str:
        draw_heat_map(path, swept)
        best = max(value for row in swept.recall for value in row)
        return f"{swept.benchmark}: R@{swept.k} {swept.retrieved:.1f} retrieved, at most {best:.1f} re-ranked"

    return draw


def _swept(asked: ShowCommand) -> SweptRecall:
    from eval.sweep import read_swept

    if len(asked.images) != 1:
        raise ValueError("show sweep takes one folder that `rerankvpr eval --sweep --out` wrote, or one benchmark")
    (given,) = asked.what
    folder = given / "sweeps" if (given / "sweeps").is_dir() else given
    files = [given] if given.is_file() else sorted(folder.rglob("*.json")) if folder.name == "sweeps" else []
    if len(files) > 1:
        raise ValueError(f"{folder}: {len(files)} sweeps; name one of them, such as {files[0]}")
    if files:
        return read_swept(files[0])
    if not asked.model:
        raise ValueError(
            f"{given}: no sweep there; `rerankvpr eval ... --sweep --out {given}` writes one, and a benchmark's name "
            "with --model sweeps it"
        )
    return _sweep_benchmark(asked, str(given))


def _sweep_benchmark(asked: ShowCommand, name: str) -> SweptRecall:
    from eval.evaluate import FirstStage, check_depth, evaluate
    from eval.sweep import sweep_recall
    from trainer.pretrained import load
    from trainer.process_group import start_process_group, stop_process_group

    benchmark = one_benchmark(name, asked.data_root)
    if not benchmark.num_labelled:
        raise ValueError(f"show sweep needs ground truth; {benchmark.name} has none")
    rank = start_process_group(600)
    try:
        describer = load(asked.model, device=rank.device, plugins=asked.plugins, **asked.settings)
        config = describer.config
        rerank = config.rerank.model_copy(update={"enabled": True, "saliency_thresh": None})  # to sweep from 0
        config = config.model_copy(update={"rerank": rerank, "bootstrap": 0, "recall_at": config.recall_at[:1]})
        check_depth([benchmark], config)
        found: list[SweptRecall] = []

        def sweep(first: FirstStage) -> None:
            found.append(sweep_recall(first, benchmark, rerank, config.recall_at[0], rank.device))

        evaluate(describer.model, benchmark, config, on_features=sweep)
    finally:
        stop_process_group()
    return found[0]


def _run(asked: ShowCommand) -> Path:
    """The run's folder. Raises ValueError unless one is given."""
    given = asked.what
    if len(given) != 1 or not given[0].is_dir():
        named = " ".join(map(str, given)) or "nothing"
        raise ValueError(f"show {asked.kind} takes the folder of one training, such as runs/demo; not {named}")
    return given[0]


def _recipe(run: Path) -> Recipe:
    from configs.load import load_stored_recipe

    return load_stored_recipe(run / "recipe.yaml")


def _photographs(recipe: Recipe) -> tuple[Callable[[int, int], NDArray[np.uint8] | None], str]:
    """What gives the photograph of a place and view of a recipe's shard sets; and a note if that is nothing."""
    from configs.ranks import USER_ERRORS
    from configs.reading import reason
    from data_pipeline.decoders import decode_rgb
    from data_pipeline.loader import build_reader
    from data_pipeline.mixture import read_mixture

    try:
        reader = build_reader(recipe.data)
        places = read_mixture(recipe.data, reader)
    except USER_ERRORS as error:
        return (lambda *_: None), f"; without photographs: {reason(error)}"

    def photograph(place: int, view: int) -> NDArray[np.uint8] | None:
        if not 0 <= place < places.num_places:
            return None
        where = places.place_range(place)
        view = view if 0 <= view < len(where.sizes) else 0
        start, size = where.start + int(where.offsets[view]), int(where.sizes[view])
        try:
            pixels: NDArray[np.uint8] = (
                decode_rgb(reader.read(where.location, start, size, version=where.version)).permute(1, 2, 0).numpy()
            )
        except USER_ERRORS:  # one damaged photograph is no reason to draw none
            return None
        return pixels

    return photograph, ""
