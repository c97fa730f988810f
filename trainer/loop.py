"""The training loop."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from configs.progress import OnProgress
from configs.schema import Recipe
from configs.traced import part
from data_pipeline.folder_lock import held_by_rank_0
from eval.benchmarks.load import load_benchmarks
from eval.result import Result
from trainer.batches import Batches
from trainer.context import main_rank_says, open_context
from trainer.first_checks import images_per_rank
from trainer.fit_projection import fit_projection
from trainer.hard_places import HardPlaces
from trainer.held_out import held_out_benchmark
from trainer.metrics import StepMetrics
from trainer.negatives import NegativesTable
from trainer.place_loss import build_loss, place_sets
from trainer.process_group import Rank
from trainer.profile import StepProfile
from trainer.progress import progress_bar
from trainer.recorded_plugins import check_same_plugins, note_export
from trainer.resume import Resume, checkpoint_to_resume, restore
from trainer.saving import Saving
from trainer.schedule import learning_rate, validations_since_best
from trainer.skipped_steps import SkippedSteps
from trainer.start_time import StartTime
from trainer.state import Progress, build_state
from trainer.step import StepOutcome, TrainingStep
from trainer.stop_signal import Stopped, StopSignal
from trainer.summary import Summary, summarise
from trainer.validation import Validation
from trainer.votes import settle_votes, votes_of_rank


class Training:
    """One training: its parts, and where it stands."""

    def __init__(
        self, recipe: Recipe, rank: Rank, console: Console, *, resume: Resume | None, start_time: StartTime
    ) -> None:
        say = main_rank_says(rank, console)
        check_same_plugins(recipe)
        num_images = images_per_rank(recipe, rank.world_size)
        checkpoint = checkpoint_to_resume(recipe, resume, say)
        start_time.part_done("checkpoint")
        if checkpoint is None and (note := note_export(Path(recipe.model.weights))):
            say(f"[yellow]{escape(note)}")
        benchmarks = load_benchmarks(recipe.eval.benchmarks, recipe.eval.data_root)
        self.recipe, self.rank = recipe, rank
        self.batches = Batches(recipe, rank)
        sets = place_sets(recipe, self.batches.places)
        loss = build_loss(recipe, self.batches.places, sets, rank.device)
        if loss.note:
            say(f"[yellow]{loss.note}")
        if len(held_out := self.batches.plans.held_out):
            places, reader = self.batches.places, self.batches.reader
            benchmarks = [held_out_benchmark(recipe, places, held_out, reader, rank), *benchmarks]
        start_time.part_done("index")
        self.state = build_state(recipe, rank, images_per_rank=num_images, sets=sets)
        start_time.part_done("model")
        changes = restore(self.state, recipe, rank, checkpoint, dataset=self.batches.dataset, say=say)
        if checkpoint is None and (fitted := fit_projection(self.state, self.batches, recipe)):
            say(f"projection to {recipe.model.projection_dim} numbers: fitted on {fitted} training images")
        if changes:
            say(f"[yellow]resumed with another recipe: {escape(', '.join(f'{k} {v}' for k, v in changes.items()))}")
        start_time.part_done("weights")
        self.bad_images_before = self.progress.bad_images
        self.stop_signal = StopSignal()
        self.context = open_context(
            recipe, rank, console, self.progress, self.stop_signal, changes=changes, places=self.batches.places
        )
        start_time.part_done("tracking")
        self.start_time: StartTime | None = start_time  # until the first step is done
        self.start_metrics: dict[str, float] = {}  # until they are logged
        self.step = TrainingStep(self.context, loss, self.state, steps_per_epoch=self.batches.steps_per_epoch)
        self.skipped = SkippedSteps(self.context)
        self.profile = StepProfile(self.context)
        self.metrics = StepMetrics(recipe, images_per_rank=num_images)
        self.negatives = NegativesTable(self.context)
        self.hard_places = HardPlaces(self.context, self.state, self.batches)
        self.saving = Saving(self.context, self.state, self.batches)
        self.validation = Validation(self.context, self.state, self.batches, benchmarks, self.stop_signal)
        self._say_what_is_trained(checkpoint)

    @property
    def progress(self) -> Progress:
        """Where the training stands."""
        return self.state.progress

    def run(self) -> Summary:
        """Trains to the end from wherever it stands; every rank calls this."""
        self._evaluate_untrained()
        self._validate_if_due()  # a run that was killed in a validation resumes with it
        self._part_of_start_done("evaluation")
        with progress_bar(self.context.console, "training", self.batches.total_steps, active=self.rank.is_main) as bar:
            batches = self.batches.from_step(self.progress.step, self.context.watchdog, self.hard_places)
            for batch, waited_s in batches:
                if self.validation.brings_no_more():
                    break
                self._part_of_start_done("batch")
                began = time.perf_counter() - waited_s
                lr = self._learning_rate()
                with self.profile.step(self.progress.step):
                    outcome = self.step(batch, lr, partial(votes_of_rank, self.batches, self.stop_signal, self.saving))
                votes = settle_votes(outcome.votes, self.saving)
                self.progress.bad_images = self.bad_images_before + votes.bad_images
                if not outcome.updated:
                    self.skipped.note(outcome, self.progress)
                self.progress.step += 1
                with part("log"):
                    self._log(outcome, lr, time.perf_counter() - began, waited_s, bar)
                    self.negatives.append(outcome.negatives)
                self.saving.save_if_due(asked_to_stop=votes.asked_to_stop, by_time=votes.save_is_due)
                self._validate_if_due()
        self.profile.stop()
        self.negatives.send()
        self._say_why_it_ends()
        self.saving.save_at_the_end()
        results = self._evaluate_trained()
        if recalls := self.validation.recalls_line():
            self.context.say(recalls)
        return summarise(self.context, self.progress, self.saving.folder, results)

    def _evaluate_untrained(self) -> None:
        if self.progress.step == 0:
            results = self.validation.evaluate("untrained", rerank=True)
            self.progress.before = [result.as_dict() for result in results]

    def _validate_if_due(self) -> None:
        if self.validation.is_due():
            self.saving.check_network()  # else an image would be blamed
            self.saving.writer.finish()  # who leaves the evaluation could not make a checkpoint valid
            with part("validate"):
                self._keep_if_best(self.validation.validate())
            self.negatives.send()

    def _evaluate_trained(self) -> list[Result]:
        results = self.validation.evaluate_trained(self.recipe.output / "pictures")
        if len(results) == len(self.validation.benchmarks):  # else the mean would be of other benchmarks
            self._keep_if_best(self.validation.note_recall(results))
        return results

    def _keep_if_best(self, recall: float | None) -> None:
        if recall is not None:
            self.saving.keep_if_best(recall)

    def _learning_rate(self) -> float:
        return learning_rate(
            self.progress.step,
            total_steps=self.batches.total_steps,
            steps_per_epoch=self.batches.steps_per_epoch,
            optim=self.recipe.optim,
            recalls=self.progress.recalls.values(),
        )

    def _log(self, outcome: StepOutcome, lr: float, seconds: float, waited_s: float, bar: OnProgress) -> None:
        """The step that is just done, to the tracker and to the progress bar."""
        step = self.progress.step
        self._note_start()
        if step % self.recipe.trainer.log_every_steps == 0:
            epoch = (step - 1) // self.batches.steps_per_epoch
            metrics = self.metrics.of(outcome, self.progress, epoch=epoch, lr=lr, seconds=seconds, waited_s=waited_s)
            self.context.tracker.metrics(metrics | self.start_metrics | self.hard_places.figures(), step)
            self.start_metrics = {}
        queue = f"queue {len(self.state.queue)}" if outcome.queue_used else "queue off"
        bar(step, note=f"loss {outcome.loss:.3f}  {outcome.num_images / seconds:.0f} images/s  {queue}")

    def _part_of_start_done(self, name: str) -> None:
        if self.start_time:
            self.start_time.part_done(name)

    def _note_start(self) -> None:
        """After this process's first step: how long it took to get there."""
        if self.start_time:
            self._part_of_start_done("step")
            self.context.say(self.start_time.line())
            self.start_metrics, self.start_time = self.start_time.metrics(), None

    def _say_what_is_trained(self, resumed_from: Path | None) -> None:
        recipe, batches = self.recipe, self.batches
        if resumed_from:
            self.context.say(f"resumed from {resumed_from}, step {self.progress.step} of {batches.total_steps}")
            if self.rank.is_main and (again := batches.read_again(self.progress.step)):
                self.context.say(again)
        trained, total = self.state.num_parameters()
        self.context.say(
            f"{recipe.name}: {recipe.model.backbone}, {trained / 1e6:.1f} M of {total / 1e6:.1f} M parameters trained; "
            f"{batches.places.num_places} places{self._held_out()}, {batches.steps_per_epoch} steps per epoch, "
            f"{batches.total_steps} in all; {self.rank.world_size} rank(s) on {self.rank.device.type}, "
            f"ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}"
        )

    def _held_out(self) -> str:
        held_out = self.batches.plans.held_out
        return f" ({len(held_out)} of them held out)" if len(held_out) else ""

    def _say_why_it_ends(self) -> None:
        if streamed := self.batches.streamed():
            self.context.say(streamed)
        if self.validation.brings_no_more():
            since = validations_since_best(self.progress.recalls.values())
            self.context.say(f"{since} validations without a better recall: stopped early")


def train(
    recipe: Recipe, rank: Rank, console: Console, *, resume: Resume | None, start_time: StartTime | None = None
) -> Summary:
    """Trains a recipe on all ranks, from a checkpoint if `resume`, and evaluates it before and after.

    `start_time` is the process's, if its caller keeps one. Raises LockedError if another process writes to the
    recipe's output.
    """
    with held_by_rank_0(recipe.output, "rerankvpr train"):
        training = Training(recipe, rank, console, resume=resume, start_time=start_time or StartTime())
        tracker = training.context.tracker
        try:
            with training.stop_signal, training.context.watchdog:
                summary = training.run()
        except BaseException as error:
            tracker.close("KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")
            raise
        tracker.close("FINISHED")  # may wait for MLflow
        for what, where in tracker.where().items():
            training.context.say(f"{what}: {escape(where)}")
    return summary
