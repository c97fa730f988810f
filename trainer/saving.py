"""When a training is saved: at its interval, on request, at the end until it succeeds, and as the best so far."""

from __future__ import annotations

import math
import time

import torch

from configs.ranks import from_rank_0
from configs.traced import part
from trainer.batches import Batches
from trainer.checkpoint import checkpoint_contents, recipe_files
from trainer.checkpoint_folder import best_recall, drop_lost_best, point, step_name
from trainer.checkpoint_writer import CheckpointWriter
from trainer.context import Context
from trainer.engine import weights_are_finite
from trainer.errors import TrainingError
from trainer.save_interval import SaveClock
from trainer.state import TrainingState
from trainer.stop_signal import Stopped, how_to_resume

SAVE_AGAIN_S = 5.0


class Saving:
    """The checkpoints of one training; every rank has one and calls its methods at the same steps."""

    def __init__(self, context: Context, state: TrainingState, batches: Batches) -> None:
        self.recipe, self.rank, self.say = context.recipe, context.rank, context.say
        self.tracker, self.watchdog, self.state = context.tracker, context.watchdog, state
        self.folder = self.recipe.output / "checkpoints"
        self.total_steps = batches.total_steps
        trainer = self.recipe.trainer
        self.every = trainer.checkpoint_every_steps or batches.steps_per_epoch
        self.clock = SaveClock(trainer.checkpoint_every_s, trainer.mean_time_between_failures_s)
        self._held_s = 0.0
        self.writer = CheckpointWriter(
            self.folder,
            keep_last=self.recipe.trainer.keep_last,
            say=self.say,
            before_valid=self.tracker.flush,  # a killed run resumes from here, and its curves with it
        )
        self._texts = recipe_files(self.recipe)

    def save(self) -> None:
        """Starts to write a checkpoint of the present step, which is valid some steps later.

        A network that holds infinities or NaN is not written: it would push the good checkpoints out.
        """
        began = time.monotonic()
        self.clock.saving()
        progress = self.state.progress
        if not weights_are_finite(self.state.engine):
            self.say(f"[yellow]step {progress.step}: the network holds numbers that are not finite; not saved")
            return
        self.watchdog.enter("save", progress.step)
        progress.training, progress.mlflow_run_id = self.tracker.training, self.tracker.run_id
        progress.num_threads = torch.get_num_threads()
        self.writer.begin(progress.step, checkpoint_contents(self.state, self._texts))
        self._held_s = time.monotonic() - began

    def is_due_by_time(self) -> bool:
        """Whether this rank votes for a checkpoint by the clock; only rank 0 ever does."""
        return self.rank.is_main and self.clock.is_due()

    def settle(self, written: float, failed: float) -> None:
        """Makes what is being written valid or void once the sums of all ranks' votes say that it is done."""
        began = time.monotonic()
        valid = self.writer.settle(written, failed)
        self._held_s += time.monotonic() - began
        if not valid:
            return
        first = self.clock.held_s is None
        self.clock.saved(self._held_s)
        if first and self.clock.every_s == "auto":
            self.say(
                f"a checkpoint holds the training for {self.clock.held_s:.2f} s and is valid after "
                f"{self.clock.written_s:.1f} s: one every {self.clock.interval_s:.0f} s"
            )

    def save_if_due(self, *, asked_to_stop: bool, by_time: bool) -> None:
        """Saves at the recipe's intervals and at the last step; a request to stop saves too, and raises Stopped.

        `by_time` is what all ranks have agreed on: that the interval in seconds has passed.
        """
        step = self.state.progress.step
        last = step == self.total_steps
        if step % self.every == 0 or last or asked_to_stop or by_time:
            with part("save"):
                self.save()
        if asked_to_stop and not last:
            saved = self.writer.finish()
            where = f"saved at step {step} of {self.total_steps}" if saved else f"step {step} could not be saved"
            raise Stopped(f"asked to stop; {where}; {how_to_resume()}")

    def check_network(self) -> None:
        """Raises TrainingError, on every rank, if the network holds infinities or NaN."""
        if not weights_are_finite(self.state.engine):
            raise TrainingError(
                f"step {self.state.progress.step}: the network holds numbers that are not finite: the training has "
                "diverged; resume from the last checkpoint with a lower optim.lr"
            )

    def save_whole(self) -> bool:
        """Saves the present step unless that is done, and waits for the disks; False if they did not take it."""
        self.writer.finish()
        if not self._is_there():
            self.save()
            self.writer.finish()
        return self._is_there()

    def save_at_the_end(self) -> None:
        """The last checkpoint, tried again for trainer.save_retry_s while the disk is full or gone.

        Raises TrainingError if it could not be written, or if the network holds infinities or NaN.
        """
        self.check_network()
        retry_s = self.recipe.trainer.save_retry_s
        for tries_left in range(math.ceil(retry_s / SAVE_AGAIN_S), -1, -1):
            if self.save_whole():
                if lost := from_rank_0(lambda: drop_lost_best(self.folder)):
                    self.say(f"[yellow]{lost}")
                return
            if tries_left:
                self.say(f"[yellow]the last checkpoint is tried again in {SAVE_AGAIN_S:g} s")
                time.sleep(SAVE_AGAIN_S)
        raise TrainingError(
            f"the checkpoint of the last step, {self.state.progress.step}, could not be written for {retry_s:g} s; "
            "make room and resume with --resume"
        )

    def keep_if_best(self, recall: float) -> None:
        """Points `best` at the present step if no validation before had this recall."""
        if recall > self._best_recall() and self.save_whole() and self.rank.is_main:
            try:
                point(self.folder / "best", self.folder / step_name(self.state.progress.step), recall)
            except OSError as error:
                self.say(f"[yellow]{self.folder / 'best'} could not be written ({error}); it names the best before")

    def _is_there(self) -> bool:
        """Whether rank 0 sees the checkpoint of the present step."""
        return from_rank_0((self.folder / step_name(self.state.progress.step)).exists)

    def _best_recall(self) -> float:
        """`best_recall` as rank 0 reads it."""
        return from_rank_0(lambda: best_recall(self.folder))
