"""Evaluation in the middle of training: when it is due, and on the same ranks with the same weights."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from configs.full_disk import is_disk_full
from configs.progress import OnProgress
from configs.ranks import USER_ERRORS
from configs.reading import reason
from configs.schema import EvalConfig
from eval.benchmarks.benchmark import Benchmark
from eval.evaluate import evaluate
from eval.feature_cache import FeatureCache
from eval.pixels import as_trained, pixel_differences
from eval.result import Result
from trainer.batches import Batches
from trainer.context import Context
from trainer.engine import whole_weights
from trainer.progress import progress_bar
from trainer.provenance import how_made
from trainer.schedule import validations_since_best
from trainer.state import TrainingState
from trainer.stop_signal import StoppedInEvaluation, StopSignal, how_to_resume
from trainer.tracking import means_of


class Validation:
    """The recipe's benchmarks, evaluated with the weights in the engine."""

    def __init__(
        self,
        context: Context,
        state: TrainingState,
        batches: Batches,
        benchmarks: list[Benchmark],
        stop_signal: StopSignal,
    ) -> None:
        self.data, self.trainer, self.rank = context.recipe.data, context.recipe.trainer, context.rank
        self.config = as_trained(context.recipe.eval, self.data)
        self.tracker, self.watchdog, self.console = context.tracker, context.watchdog, context.console
        self.state, self.batches, self.benchmarks, self.stop_signal = state, batches, benchmarks, stop_signal
        self.output = context.recipe.output

    def is_due(self) -> bool:
        """Whether the recipe's interval has come, and this step is not validated yet.

        The last step never is: its evaluation is the final one.
        """
        step, every = self.state.progress.step, self.trainer.validate_every_epochs
        epoch, into_epoch = divmod(step, self.batches.steps_per_epoch)
        if not (every and step and into_epoch == 0 and epoch % every == 0 and step < self.batches.total_steps):
            return False
        return str(step) not in self.state.progress.recalls

    def brings_no_more(self) -> bool:
        """Whether the last `trainer.early_stop_evals` validations in a row brought no better recall."""
        return 0 < self.trainer.early_stop_evals <= validations_since_best(self.state.progress.recalls.values())

    def validate(self) -> float | None:
        """Evaluates the present step without re-ranking; the mean recall, or None without benchmarks."""
        epoch = self.state.progress.step // self.batches.steps_per_epoch
        return self.note_recall(self.evaluate(f"epoch {epoch}", rerank=False))

    def note_recall(self, results: list[Result]) -> float | None:
        """The mean over benchmarks of the first-stage recall at the smallest K, which progress keeps; None for none.

        `best`, early stopping and the plateau schedule go by it.
        """
        if not results:
            return None
        k = self.config.recall_at[0]
        recall = sum(result.retrieved[k] for result in results) / len(results)
        self.state.progress.recalls[str(self.state.progress.step)] = recall
        return recall

    def recalls_line(self) -> str:
        """The mean recall at the smallest K of each validation, by step; empty if there was none."""
        recalls = self.state.progress.recalls
        if not recalls:
            return ""
        best = max(recalls, key=lambda step: recalls[step])
        said = ", ".join(f"{value:.1f}{' (best)' if step == best else ''} at {step}" for step, value in recalls.items())
        return f"mean R@{self.config.recall_at[0]} by step: {said}"

    def evaluate_trained(self, pictures: Path) -> list[Result]:
        """Results at the end, when all is saved; every rank must call this.

        What a full disk does not take is reported: a benchmark whose features found no room is not in the results.
        """
        return self.evaluate("trained", rerank=True, pictures=pictures, survives_full_disk=True)

    def evaluate(
        self, label: str, *, rerank: bool, pictures: Path | None = None, survives_full_disk: bool = False
    ) -> list[Result]:
        """Results of all benchmarks, printed and tracked; every rank must call this.

        Raises StoppedInEvaluation on a rank that is asked to stop.
        """
        if not self.benchmarks:
            return []  # at ZeRO-3 the whole weights would be gathered for nothing
        config, step, results = self._config(rerank), self.state.progress.step, []
        if self.rank.is_main and (told := pixel_differences(config, self.data)):
            self.console.print(f"[yellow]{label}: {told}", highlight=False, soft_wrap=True)
        cache = FeatureCache(self.benchmarks, config.features, beside=self.output)
        self.watchdog.enter("evaluation", step)
        with whole_weights(self.state.engine):
            for benchmark in self.benchmarks:
                with progress_bar(self.console, f"{label}: {benchmark.name}", active=self.rank.is_main) as update:
                    progress = self._watched(update)
                    try:
                        result = evaluate(self.state.model, benchmark, config, on_progress=progress, cache=cache)
                    except USER_ERRORS as error:  # extraction meets a full disk on all ranks together
                        if not (survives_full_disk and is_disk_full(error)):
                            raise
                        self._say(
                            f"{label}: {benchmark.name}: its features found no room ({reason(error)}); not evaluated"
                        )
                        continue
                results.append(result)
                params = {"benchmark": benchmark.name, "protocol": result.protocol, "weights": label, "rerank": rerank}
                # Extraction costs less without local features: a curve is of evaluations that are alike.
                curves = result.metrics() if rerank or not self.config.rerank.enabled else result.recalls()
                self.tracker.evaluation(benchmark.name, step, params, result.metrics(), curves=curves)
                if self.rank.is_main:
                    self.console.print(f"{label}: {result.line()}", highlight=False, soft_wrap=True)
                if pictures and self.rank.is_main:
                    self._draw(pictures / benchmark.name, benchmark, result, config)
            if results:
                self.tracker.metrics(means_of([result.recalls() for result in results]), step)
            if pictures and results and self.rank.is_main:
                self._report(pictures.parent, results, config)
        return results

    def _report(self, output: Path, results: list[Result], config: EvalConfig) -> None:
        """Predictions and the page, beside the results of the training."""
        from eval.report.predictions import predictions_table, write_predictions
        from eval.report.training_curves import training_curves
        from eval.report.written import write_report

        names = [result.name for result in results]
        benchmarks = [benchmark for benchmark in self.benchmarks if benchmark.name in names]
        tables = [
            predictions_table(benchmark, result, config.recall_at[-1])
            for benchmark, result in zip(benchmarks, results, strict=True)
        ]
        self.tracker.flush()  # the page has the training's curves
        try:
            write_predictions(output, tables)
            write_report(
                output / "report.html",
                self.state.model,
                benchmarks,
                results,
                tables,
                config,
                name=str(output),
                facts=how_made(world_size=self.rank.world_size, device=self.rank.device) | self.tracker.where(),
                curves=training_curves(output / "metrics.jsonl"),
            )
            self.tracker.artifact(output / "report.html")
            self.console.print(f"report: {output / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
        except OSError as error:
            self._say(f"{output / 'report.html'} could not be written ({reason(error)})")

    def _draw(self, folder: Path, benchmark: Benchmark, result: Result, config: EvalConfig) -> None:
        from eval.report.pictures import draw_pictures  # matplotlib, which a start need not wait for

        try:
            for picture in draw_pictures(folder, benchmark, result, self.state.model, config):
                place, step = f"pictures/{benchmark.name}", self.state.progress.step
                image = f"{place}/{picture.stem}"
                self.tracker.artifact(picture, place, image=image, step=step, evaluation=benchmark.name)
        except OSError as error:
            self._say(f"pictures could not be written to {folder} ({reason(error)})")

    def _say(self, text: str) -> None:
        if self.rank.is_main:
            self.console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)

    def _config(self, rerank: bool) -> EvalConfig:
        if rerank:
            return self.config
        return self.config.model_copy(update={"rerank": self.config.rerank.model_copy(update={"enabled": False})})

    def _watched(self, update: OnProgress) -> OnProgress:
        """`update`, told to the watchdog too. A rank that is asked to stop leaves the evaluation at once."""

        def all_of_it(done: int, total: int | None = None, note: str = "") -> None:
            if self.stop_signal.name:  # an evaluation may last longer than a scheduler waits
                where = f"in the evaluation after step {self.state.progress.step}"
                raise StoppedInEvaluation(f"asked to stop {where}; {how_to_resume()}")
            self.watchdog.alive()
            update(done, total, note)

        return all_of_it
