"""`rerankvpr eval`: benchmarks in, a table, `results.json` and pictures out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from configs.load import load_recipe
from configs.schema import Backbone, EvalConfig, ModelConfig, Recipe
from trainer.checkpoint import find_checkpoint, load_model_weights
from trainer.process_group import Rank, start_process_group, stop_process_group
from trainer.progress import progress_bar


@dataclass(frozen=True)
class EvalCommand:
    """Evaluates a checkpoint or a backbone on benchmarks, first stage and re-ranked side by side."""

    checkpoint: Path | None = None
    """A step folder, or a run's output folder (its best checkpoint, else its newest)."""
    weights: Path | None = None
    """Backbone weights in facebookresearch's key layout (.pth or .safetensors), as they are."""
    backbone: Backbone | Literal["auto"] = "auto"
    """Backbone of --weights; auto reads it off the file."""
    aggregator: Literal["cls", "gem"] = "cls"
    """Aggregator over --weights."""
    out: Path | None = None
    """Folder for results.json and pictures."""
    eval: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)


def parse(argv: list[str]) -> tuple[EvalCommand, Path | None, Recipe]:
    """The command, the checkpoint folder that it means, and the recipe that the model is built from."""
    default, checkpoint, recipe = EvalCommand(), None, Recipe()
    given = _value_of("--checkpoint", argv)
    if given and _value_of("--weights", argv):
        raise ValueError("eval takes --checkpoint or --weights, not both")
    if given:
        checkpoint = find_checkpoint(Path(given))
        recipe = load_recipe(checkpoint / "recipe.yaml")
        default = EvalCommand(eval=recipe.eval)
    command = tyro.cli(
        EvalCommand, args=argv, default=default, prog="rerankvpr eval", config=(tyro.conf.FlagConversionOff,)
    )
    if not command.eval.benchmarks:
        raise ValueError("eval needs --benchmarks, such as town or gardens_point/day_right/night_right/100-199")
    if command.weights:
        from model.backbone import infer_backbone

        backbone = infer_backbone(command.weights) if command.backbone == "auto" else command.backbone
        model = ModelConfig.model_validate(
            {
                "backbone": backbone,
                "weights": str(command.weights),
                "aggregator": command.aggregator,
                "finetune_last_n_blocks": 0,
            }
        )
        recipe = Recipe(model=model)
    elif checkpoint is None:
        raise ValueError("eval needs --checkpoint DIR or --weights FILE")
    return command, checkpoint, recipe


def _value_of(flag: str, argv: list[str]) -> str | None:
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def main(argv: list[str]) -> int:
    """Runs one rank of an evaluation."""
    from eval.benchmarks import load_benchmarks
    from eval.evaluate import FeatureStore, evaluate
    from eval.report import draw_pictures, results_table, write_results
    from model.network import build_model

    command, checkpoint, recipe = parse(argv)
    config = command.eval
    benchmarks = load_benchmarks(config.benchmarks, config.data_root)
    console = Console()
    rank: Rank = start_process_group(recipe.engine.timeout_s)
    if checkpoint:
        model = build_model(recipe.model.model_copy(update={"weights": "random"}), seed=recipe.seed)
        load_model_weights(model, checkpoint)
    else:
        model = build_model(recipe.model, seed=recipe.seed)
    model.to(rank.device).eval()
    results, store = [], FeatureStore(benchmarks)
    for benchmark in benchmarks:
        with progress_bar(console, benchmark.name, active=rank.is_main) as update:
            result = evaluate(model, benchmark, config, on_progress=update, store=store)
        results.append(result)
        if command.out and rank.is_main and config.pictures:
            draw_pictures(command.out / "pictures" / benchmark.name, benchmark, result, model, config)
    if rank.is_main:
        console.print(results_table(results))
        if command.out:
            write_results(command.out / "results.json", results, model=str(checkpoint or command.weights))
            console.print(f"written: {command.out / 'results.json'}", soft_wrap=True)
    stop_process_group()
    return 0
