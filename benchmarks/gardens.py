"""The tables of docs/results.md: Gardens Point, frozen and fine-tuned, before and after re-ranking; choice; auto.

`python -m benchmarks.gardens --weights FILE --data-root DATA [--checkpoint RUN] [--parts choice recalls auto]`.
`choice` picks depth, thresholds, geometry and global weight from a grid, over all models, at `--choice-sizes` alone, on
the pairs that do not put the two traverses of the claim against each other; the schema's defaults stand beside that
choice. `recalls` is all six pairs by the defaults, `auto` the same by `rerank.when` auto and adaptive, and with matches
weighted by saliency. Features are kept in `--features` and read again by later runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro

from benchmarks.report import machine, print_table, write_json
from configs.load import load_stored_recipe
from configs.schema import EvalConfig, ModelConfig, RerankConfig
from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.load import load_benchmarks
from eval.evaluate import FirstStage, evaluate
from eval.feature_cache import FeatureCache
from eval.recall import recall_at
from eval.rerank import fuse, reorder
from eval.result import Result
from eval.sweep import Sweep, sweep_thresholds
from model.network import PlaceModel, build_model
from trainer.checkpoint import load_model_weights
from trainer.checkpoint_folder import find_checkpoint

CLAIMED = ("day_right", "night_right")  # database and queries of the claim
TOP_K = (10, 15, 20, 30)
SALIENCY = (0.2, 0.3)
MATCH = (0.6, 0.65, 0.7)
GEOMETRIES = ("none", "translation 1", "translation 2")  # and patches by which a match may miss the shift
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
HELD_OUT = "100-199"  # frames that no training set of this project shows
Point = tuple[int, float, float, str, float]
Run = tuple[str, PlaceModel, str]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    weights: Path
    """ViT-S/14 weights of the frozen model."""
    data_root: Path = Path("data")
    """Folder that holds gardens_point/."""
    checkpoint: Path | None = None
    """Fine-tuned run; judged, as the frozen model beside it, on frames 100-199."""
    features: Path = Path("runs/gardens_features")
    """Folder that keeps features."""
    image_sizes: tuple[int, ...] = (224, 322)
    """Sides in pixels."""
    frozen_held_out: bool = True
    """Also judge the frozen model on frames 100-199 alone, beside the fine-tuned one."""
    choice_sizes: tuple[int, ...] = (224,)
    """Sides at which defaults are chosen."""
    parts: tuple[Literal["choice", "recalls", "auto"], ...] = ("choice", "recalls", "auto")
    """What is computed."""
    json: Path | None = None
    """File for the figures."""
    markdown: Path | None = None
    """File for the tables."""


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options, prog="python -m benchmarks.gardens", config=(tyro.conf.FlagConversionOff,))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    frozen = build_model(ModelConfig(backbone="vits14", weights=str(options.weights), finetune_last_n_blocks=0))
    figures: dict[str, float] = {}
    runs: list[Run] = [("frozen", frozen, "gardens_point/all")]
    if options.checkpoint:
        found = find_checkpoint(options.checkpoint)
        recipe = load_stored_recipe(found / "recipe.yaml")
        tuned = build_model(recipe.model.model_copy(update={"weights": "random"}))
        load_model_weights(tuned, found)
        spec = f"gardens_point/all/{HELD_OUT}"
        runs += [("frozen", frozen, spec)] * options.frozen_held_out + [("fine-tuned", tuned, spec)]
    texts = []
    judged = [run for run in runs if run[0] != "frozen" or run[2].endswith("all")]
    if "choice" in options.parts:
        texts.append(_choose(judged, options, figures))
    if "recalls" in options.parts:
        texts.append(_recalls(runs, options, figures))
    if "auto" in options.parts:
        texts.append(_auto(judged, options, figures))
    if options.markdown:
        options.markdown.write_text("\n\n".join(texts) + f"\n\nMeasured on {machine()}.\n")
    write_json(options.json, figures)
    dist.destroy_process_group()


def _show(title: str, columns: Sequence[str], rows: list[list[str]]) -> str:
    """Prints a table; returns it as Markdown."""
    print_table(title, columns, rows)
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(row)} |" for row in lines)])


def _recalls(runs: list[Run], options: Options, figures: dict[str, float]) -> str:
    lines = []
    for label, model, spec in runs:
        for side in options.image_sizes:
            for result in _evaluate(model.eval(), spec, side, options, RerankConfig()):
                lines.append(_line(label, side, result))
                print(" | ".join(lines[-1]), flush=True)
                for k in (1, 5, 10):
                    assert result.reranked
                    assert result.gain
                    key = f"{_key(label, side, result)}_r{k}"
                    figures[key], figures[f"{key}_reranked"] = result.retrieved[k], result.reranked[k]
                    figures["least_gain"] = min(figures.get("least_gain", np.inf), result.gain[k])
    columns = ("model", "px", "database -> query", "frames", "R@1/5/10", "re-ranked", "gain of R@1, 95 % interval")
    return _show("Gardens Point, +-2 frames", columns, lines)


def _auto(runs: list[Run], options: Options, figures: dict[str, float]) -> str:
    """Re-ranking all candidates of all queries beside `rerank.when` auto and adaptive, and weights of saliency."""
    lines = []
    settings: dict[str, dict[str, Any]] = {
        "always": {},
        "auto": {"when": "auto"},
        "adaptive": {"when": "adaptive"},
        "saliency": {"match_weight": "saliency"},
    }
    for label, model, spec in runs:
        for side in options.image_sizes:
            results = {
                name: _evaluate(model.eval(), spec, side, options, RerankConfig.model_validate(changes))
                for name, changes in settings.items()
            }
            for always, auto, adaptive, saliency in zip(*results.values(), strict=True):
                key = _key(label, side, always)
                reranked = [result.reranked for result in (always, auto, adaptive, saliency) if result.reranked]
                alone = 100 * auto.num_left_alone / auto.num_queries
                figures |= {f"{key}_left_alone": alone, f"{key}_adaptive_depth": adaptive.mean_depth}
                for name, recall in zip(settings, reranked, strict=True):
                    figures |= {f"{key}_{name}_r{k}": recall[k] for k in (1, 5, 10)}
                least = min(reranked[2][k] - reranked[0][k] for k in (1, 5, 10))
                has_say = not set(always.name.split("/")) >= set(CLAIMED)
                worst = "adaptive_least_of_pairs_that_choose" if has_say else "adaptive_least_of_pairs_left_out"
                figures[worst] = min(figures.get(worst, np.inf), least)
                depths = (f"{alone:.1f}", f"{adaptive.mean_depth:.1f}")
                lines.append([*_line(label, side, always)[:4], str(always.retrieved), *map(str, reranked), *depths])
                print(" | ".join(lines[-1]), flush=True)
    columns = (
        *("model", "px", "database -> query", "frames", "R@1/5/10", "always", "auto", "adaptive", "saliency weights"),
        *("auto: % left alone", "adaptive: candidates a query"),
    )
    return _show("rerank.when and rerank.match_weight", columns, lines)


def _key(label: str, side: int, result: Result) -> str:
    _, database, query, *frames = result.name.split("/")
    return f"{label}_{'_'.join(frames) or 'all'}_{side}_{database}_{query}"


def _config(side: int, options: Options, rerank: RerankConfig) -> EvalConfig:
    return EvalConfig(data_root=options.data_root, image_size=side, features=options.features, rerank=rerank)


def _evaluate(model: PlaceModel, spec: str, side: int, options: Options, rerank: RerankConfig) -> list[Result]:
    benchmarks = load_benchmarks([spec], options.data_root)
    cache, config = FeatureCache(benchmarks, options.features), _config(side, options, rerank)
    return [evaluate(model, benchmark, config, cache=cache) for benchmark in benchmarks]


def _line(label: str, side: int, result: Result) -> list[str]:
    assert result.reranked
    _, database, query, *frames = result.name.split("/")
    assert result.gain
    gain = result.gain.by_k[1]
    low, high = gain.interval or (0.0, 0.0)
    return [
        label,
        str(side),
        f"{database} -> {query}",
        frames[0] if frames else "0-199",
        str(result.retrieved),
        str(result.reranked),
        f"{gain.value:+.1f} ({low:+.1f} to {high:+.1f})",
    ]


def _choose(runs: list[Run], options: Options, figures: dict[str, float]) -> str:
    """The points with the largest mean gain of R@1 among those that lower no R@1, R@5 or R@10.

    Pairs that put the two traverses of the claim against each other have no say; what each point does on them stands
    beside the choice.
    """
    stored = RerankConfig(saliency_thresh=SALIENCY[0], top_k=max(TOP_K))
    gains: dict[Point, list[float]] = {}
    left_out: dict[Point, list[float]] = {}
    claimed: dict[Point, float] = {}
    for label, model, spec in runs:
        for side in options.choice_sizes:
            benchmarks = load_benchmarks([spec], options.data_root)
            cache = FeatureCache(benchmarks, options.features)
            for benchmark in benchmarks:
                seen: list[tuple[FirstStage, dict[str, Sweep]]] = []

                def sweep(found: FirstStage, seen: list[tuple[FirstStage, dict[str, Sweep]]] = seen) -> None:
                    candidates, swept = found.predictions_QK[:, : stored.top_k], {}
                    for geometry in GEOMETRIES:
                        how = stored.model_copy(update=_geometry(geometry))
                        args = found.queries, found.database, candidates, how, torch.device("cpu")
                        swept[geometry] = sweep_thresholds(*args, saliency=SALIENCY, match=MATCH)
                    seen.append((found, swept))

                config = _config(side, options, stored.model_copy(update={"top_k": 1}))
                config = config.model_copy(update={"recall_at": [1, 5, 10, stored.top_k]})
                evaluate(model.eval(), benchmark, config, cache=cache, on_features=sweep)
                print(f"swept {label}, {benchmark.name}, {side} px", flush=True)
                of_pair = _gains(benchmark, *seen[0])
                has_say = not set(benchmark.name.split("/")) >= set(CLAIMED)
                for point, gain in of_pair.items():
                    (gains if has_say else left_out).setdefault(point, []).extend(gain)
                if label == "frozen" and benchmark.name == "/".join(["gardens_point", *CLAIMED]):
                    claimed = {point: gain[0] for point, gain in of_pair.items()}
    harmless = {point: gain for point, gain in gains.items() if min(gain) >= 0}
    ranked = sorted(harmless, key=lambda point: -float(np.mean(harmless[point][::3])))
    default = RerankConfig()
    named = default.geometry + (f" {default.geometry_cells}" if default.geometry != "none" else "")
    own: Point = (default.top_k, default.saliency_thresh or 0.0, default.nn_match_thresh, named, default.global_weight)
    rows = [
        [
            name,
            *(str(x) for x in point),
            *(
                text
                for of in (gains, left_out)
                for text in (f"{np.mean(of[point][::3]):+.2f}", f"{min(of[point]):+.1f}")
            ),
        ]
        for name, point in (*((str(i + 1), point) for i, point in enumerate(ranked[:8])), ("default", own))
    ]
    columns = (
        *("", "top_k", "saliency", "match", "geometry", "weight", "mean gain of R@1", "least gain of R@1/5/10"),
        *("left-out pairs: mean gain of R@1", "least of R@1/5/10"),
    )
    figures |= {
        "points": float(len(gains)),
        "harmless_points": float(len(harmless)),
        "default_rank": float(ranked.index(own) + 1 if own in harmless else 0),
        "choice_mean_gain_r1": float(np.mean(gains[ranked[0]][::3])),
        "default_mean_gain_r1": float(np.mean(gains[own][::3])),
        "default_least_gain": min(gains[own]),
        "claimed_gain_r1_least": min(claimed.values()),
        "claimed_gain_r1_most": max(claimed.values()),
    }
    print(
        f"{' -> '.join(CLAIMED)}, frozen: {min(claimed.values()):+.1f} to {max(claimed.values()):+.1f} over all points"
    )
    return _show(f"The best of {len(harmless)} harmless points among {len(gains)}", columns, rows)


def _geometry(name: str) -> dict[str, Any]:
    """A name of GEOMETRIES as settings."""
    kind, _, cells = name.partition(" ")
    return {"geometry": kind, "geometry_cells": int(cells or 0)}


def _gains(benchmark: Benchmark, found: FirstStage, by_geometry: dict[str, Sweep]) -> dict[Point, list[float]]:
    """Gain of R@1, R@5 and R@10 at each point of the grid."""
    before = recall_at(found.predictions_QK, benchmark, [1, 5, 10])
    gains: dict[Point, list[float]] = {}
    for geometry, swept in by_geometry.items():
        for (s, saliency), (m, match) in product(enumerate(swept.saliency), enumerate(swept.match)):
            for top_k, weight in product(TOP_K, WEIGHTS):
                scores_QT, cosine_QT = swept.scores_SMQT[s, m][:, :top_k], found.similarities_QK[:, :top_k]
                key_QT = fuse(scores_QT, cosine_QT, swept.patches_SQ[s], weight)
                after = recall_at(reorder(key_QT, found.predictions_QK), benchmark, [1, 5, 10])
                gains[top_k, saliency, match, geometry, weight] = [after[k] - before[k] for k in (1, 5, 10)]
    return gains


if __name__ == "__main__":
    main()
