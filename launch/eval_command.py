"""`rerankvpr eval`: benchmarks in, a table, `results.json` and pictures out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.explain import explain
from configs.flags import parse_flags, parse_known_flags
from configs.load import check_network, load_stored_recipe
from configs.plugins import load_plugins
from configs.progress import OnProgress
from configs.reading import reason
from configs.schema import EvalConfig, ModelConfig, Recipe
from trainer.progress import progress_bar

if TYPE_CHECKING:  # help, --list and mistakes should not wait for torch
    from eval.benchmarks.benchmark import Benchmark
    from eval.evaluate import FirstStage, OnFeatures
    from eval.result import Result
    from trainer.process_group import Rank


PROG = "rerankvpr eval"


@dataclass(frozen=True)
class EvalCommand:
    """Evaluates a checkpoint or a backbone on benchmarks, first stage and re-ranked side by side."""

    checkpoint: Path | None = None
    """A step folder, or a run's output folder (its best checkpoint, else its newest)."""
    weights: Path | None = None
    """Backbone weights in facebookresearch's key layout (.pth or .safetensors), as they are."""
    backbone: str = "auto"
    """Backbone of --weights; auto reads it off the file."""
    aggregator: str = "auto"
    """Aggregator over --weights; auto is that of an exported file, else cls."""
    plugins: tuple[str, ...] = ()
    """Your code, files (my_vpr.py) or modules, that adds aggregators, backbones or benchmarks; see docs/extending.md.
    That of a checkpoint is run only if it is named here."""
    database: Path | None = None
    """Any folder of photographs to search, with --queries; sub-folders too."""
    queries: Path | None = None
    """Any folder of photographs to find in --database."""
    radius_m: float | None = None
    """Metres within which images show one place, for folder:, manifest:, layout: and --database; None is 25."""
    no_labels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Predictions without recall, whatever ground truth there is."""
    out: Path | None = None
    """Folder for report.html, results.json, results.csv, predictions.parquet, predictions.csv, files for contests and
    pictures."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Lists the benchmarks: where to get each, the layouts that are read, what is found under --data-root."""
    no_rerank: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Retrieval only; the same as --rerank.no-enabled."""
    sweep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also re-ranks at a grid of saliency and match thresholds; a table and, with --out, a heat map per benchmark."""
    track: str = ""
    """MLflow store or server to log the results to; under the training's run if --checkpoint names it."""
    stall_s: float = 900
    """Seconds without progress of any rank after which the job ends and the rank that stalled is named; 0 is never."""
    eval: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)


def parse(argv: list[str]) -> tuple[EvalCommand, Path | None, Recipe]:
    """The command, the checkpoint folder that it means, and the recipe that the model is built from."""
    default, checkpoint, recipe = EvalCommand(), None, Recipe()
    named, _ = parse_known_flags(_Named, argv, prog=PROG)
    load_plugins(named.plugins)
    if named.checkpoint and named.weights:
        raise ValueError("eval takes --checkpoint or --weights, not both")
    if named.checkpoint:
        from trainer.checkpoint_folder import find_checkpoint

        checkpoint = find_checkpoint(named.checkpoint)
        recipe = load_stored_recipe(checkpoint / "recipe.yaml")
        check_network(recipe, checkpoint / "recipe.yaml")
        own = recipe.eval if named.database is None else recipe.eval.model_copy(update={"benchmarks": []})
        default = EvalCommand(eval=own)
    command = parse_flags(EvalCommand, argv, default=default, prog=PROG)
    if command.list:
        return command, None, recipe
    if command.no_rerank:
        off = command.eval.rerank.model_copy(update={"enabled": False})
        command = replace(command, eval=command.eval.model_copy(update={"rerank": off}))
    if command.sweep and not command.eval.rerank.enabled:
        raise ValueError("eval --sweep needs re-ranking: --rerank.enabled, without --no-rerank")
    if (command.database is None) != (command.queries is None):
        given, other = ("--database", "--queries") if command.database else ("--queries", "--database")
        raise ValueError(f"eval {given} needs {other} DIR too")
    if not command.eval.benchmarks and not command.database:
        raise ValueError(
            "eval needs --benchmarks, such as town, folder:PATH or gardens_point/day_right/night_right/100-199, or "
            "--database DIR --queries DIR"
        )
    if command.weights:
        recipe = _recipe_of_weights(command, command.weights)
    elif checkpoint is None:
        raise ValueError("eval needs --checkpoint DIR or --weights FILE")
    recipe.model.spec.check_side(command.eval.image_size, "--image-size")
    return command, checkpoint, recipe


def _recipe_of_weights(command: EvalCommand, file: Path) -> Recipe:
    """The recipe of --weights: an exported file's own, or one for the backbone and aggregator that flags name."""
    from eval.weights_file import recipe_of
    from model.weights import infer_backbone

    exported = recipe_of(file)
    if exported and command.backbone == command.aggregator == "auto":
        return Recipe(model=exported.model, data=exported.data)
    backbone = infer_backbone(file) if command.backbone == "auto" else command.backbone
    aggregator = "cls" if command.aggregator == "auto" else command.aggregator
    network = {"backbone": backbone, "weights": str(file), "aggregator": aggregator, "finetune_last_n_blocks": 0}
    try:
        return Recipe(model=ModelConfig.model_validate(network))
    except ValidationError as error:
        raise ValueError("\n".join(f"--{line}" for line in explain(error, ModelConfig))) from error


@dataclass(frozen=True)
class _Named:
    """What decides the defaults of the other flags."""

    plugins: tuple[str, ...] = ()
    checkpoint: Path | None = None
    weights: Path | None = None
    database: Path | None = None


def main(argv: list[str]) -> int:
    """Runs one rank of an evaluation."""
    command, checkpoint, recipe = parse(argv)
    console = Console()
    if not command.list and os.environ.get("RANK", "0") == "0" and (note := _note_plugins(command, checkpoint)):
        console.print(f"[yellow]{escape(note)}", highlight=False, soft_wrap=True)
    if command.list:
        from eval.benchmarks.overview import catalogue_table, own_table

        console.print(catalogue_table(command.eval.data_root))
        console.print(own_table())
        return 0
    from data_pipeline.folder_lock import held_by_rank_0
    from eval.benchmarks.load import load_benchmarks
    from eval.evaluate import check_depth
    from trainer import flight_recorder
    from trainer.process_group import start_process_group, stop_process_group

    benchmarks = load_benchmarks(
        command.eval.benchmarks,
        command.eval.data_root,
        labels="unused" if command.no_labels else "found",
        radius_m=command.radius_m,
        pair=(command.database, command.queries) if command.database and command.queries else None,
    )
    check_depth(benchmarks, command.eval)
    if command.sweep and (unlabelled := [b.name for b in benchmarks if not b.num_labelled]):
        raise ValueError(f"eval --sweep needs ground truth; {unlabelled[0]} has none")
    if command.out:
        flight_recorder.switch_on(command.out)
    rank: Rank = start_process_group(recipe.engine.timeout_s, tf32=recipe.engine.tf32)
    with held_by_rank_0(command.out, "rerankvpr eval") if command.out else nullcontext():
        not_written = _evaluate(console, command, checkpoint, recipe, rank, benchmarks)
    stop_process_group()
    if not_written:
        raise OSError("\n".join(not_written))
    return 0


def _note_plugins(command: EvalCommand, checkpoint: Path | None) -> str:
    from trainer.recorded_plugins import note_checkpoint, note_export

    if checkpoint:
        return note_checkpoint(checkpoint)
    return note_export(command.weights) if command.weights else ""


def _evaluate(
    console: Console,
    command: EvalCommand,
    checkpoint: Path | None,
    recipe: Recipe,
    rank: Rank,
    benchmarks: list[Benchmark],
) -> list[str]:
    """Evaluates, prints and writes; returns a line for each file that could not be written."""
    from eval.evaluate import evaluate
    from eval.feature_cache import FeatureCache
    from eval.pixels import as_trained, pixel_differences
    from eval.report.pictures import draw_pictures
    from eval.report.predictions import predictions_table, write_predictions, write_submission
    from eval.report.tables import results_table, results_title, write_csv, write_results
    from eval.report.written import write_report
    from launch.eval_tracking import Evaluation, log_evaluation
    from model.lora import merge_lora
    from model.network import build_model
    from trainer.checkpoint import load_model_weights
    from trainer.engine import DTYPES
    from trainer.mlflow_sender import run_of
    from trainer.provenance import how_made
    from trainer.watchdog import Watchdog

    config = as_trained(command.eval, recipe.data)
    trained_as = pixel_differences(config, recipe.data) if checkpoint else ""
    if checkpoint:
        model = build_model(recipe.model.model_copy(update={"weights": "random"}), seed=recipe.seed)
        load_model_weights(model, checkpoint)
        merge_lora(model)
        if config.precision == "same":  # as its training evaluated it
            model.to(DTYPES[recipe.engine.precision])
            model.cast_frozen()
    else:
        model = build_model(recipe.model, seed=recipe.seed)
    model.to(rank.device).eval()
    not_written: list[str] = []

    @contextmanager
    def writing(file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the table is printed whatever the disk takes
            not_written.append(f"{file} could not be written ({reason(error)}); the results are printed above")

    results: list[Result] = []
    predictions = []
    cache = FeatureCache(benchmarks, config.features, beside=command.out)
    watchdog = Watchdog(
        limit_s=command.stall_s if rank.world_size > 1 else 0,
        first_limit_s=command.stall_s,
        folder=command.out or Path(tempfile.gettempdir()),
        setting="--stall-s",
        remedy="with --features, features that are whole stay and the same command resumes",
    )
    with watchdog:
        for number, benchmark in enumerate(benchmarks):
            watchdog.enter("evaluation", number)
            with progress_bar(console, benchmark.name, active=rank.is_main) as update:

                def report(done: int, total: int | None = None, note: str = "", update: OnProgress = update) -> None:
                    watchdog.alive()
                    update(done, total, note)

                on_features = _sweep(console, command, benchmark, rank, writing) if command.sweep else None
                result = evaluate(model, benchmark, config, on_progress=report, cache=cache, on_features=on_features)
            results.append(result)
            if rank.is_main:
                for note in result.notes:
                    console.print(f"{benchmark.name}: {note}", style="yellow", markup=False, soft_wrap=True)
                if command.out:
                    predictions.append(predictions_table(benchmark, result, config.recall_at[-1]))
                    with writing(command.out / "submissions"):
                        for file in write_submission(command.out / "submissions", benchmark, result):
                            console.print(f"written: {file}", soft_wrap=True)
                if command.out and config.pictures:
                    folder = command.out / "pictures" / benchmark.name
                    with writing(folder):
                        draw_pictures(folder, benchmark, result, model, config)
    if rank.is_main:
        if trained_as:
            console.print(f"[yellow]{trained_as}", highlight=False, soft_wrap=True)
        for result in results:
            console.print(results_title(result), highlight=False)
            console.print(results_table(result))
        name = str(checkpoint or command.weights)
        made = how_made(world_size=rank.world_size, device=rank.device)
        if command.out:
            with writing(command.out / "results.json"):
                write_results(command.out / "results.json", results, model=name, made=made)
                console.print(f"written: {command.out / 'results.json'}", soft_wrap=True)
            with writing(command.out / "results.csv"):
                write_csv(command.out / "results.csv", results)
            with writing(command.out / "predictions.parquet"):
                write_predictions(command.out, predictions)
            with writing(command.out / "report.html"):
                write_report(
                    command.out / "report.html",
                    model,
                    benchmarks,
                    results,
                    predictions,
                    config,
                    name=name,
                    facts=made,
                )
                console.print(f"written: {command.out / 'report.html'}", soft_wrap=True)
        if command.track:
            log_evaluation(
                command.track,
                recipe.tracking.experiment,
                Evaluation(
                    model=name,
                    params={f"eval.{key}": value for key, value in config.model_dump(mode="json").items()},
                    results=results,
                    out=command.out,
                ),
                parent=run_of(checkpoint) if checkpoint else None,
                console=console,
            )
    return not_written


def _sweep(
    console: Console,
    command: EvalCommand,
    benchmark: Benchmark,
    rank: Rank,
    writing: Callable[[Path], AbstractContextManager[None]],
) -> OnFeatures:
    """What to do with a benchmark's features and candidates: the sweep, its table, its picture."""
    from eval.report.heat_map import draw_heat_map
    from eval.sweep import sweep_recall

    def run(found: FirstStage) -> None:
        swept = sweep_recall(found, benchmark, command.eval.rerank, command.eval.recall_at[0], rank.device)
        if not rank.is_main:
            return
        title = f"{swept.benchmark}: R@{swept.k} re-ranked; retrieved {swept.retrieved:.1f}\n{swept.rule}"
        table = Table("saliency \\ match", *(f"{m:g}" for m in swept.match), title=title, title_justify="left")
        for thresh, row in zip(swept.saliency, swept.recall, strict=True):
            table.add_row(f"{thresh:g}", *(f"{value:.1f}" for value in row))
        console.print(table)
        if command.out:
            for suffix, write in ((".png", lambda file: draw_heat_map(file, swept)), (".json", swept.write)):
                file = command.out / "sweeps" / f"{benchmark.name}{suffix}"
                with writing(file):
                    write(file)

    return run
