"""`negatives.csv`: the hardest negatives that the queue gave, with their ages, at an interval of steps."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from configs.schema import Recipe
from data_pipeline.loader import PlaceBatch
from memory.global_loss import GlobalLoss, GlobalLossOutput
from memory.hardest import HardNegatives, hardest_negatives
from memory.strategies import InTiles
from trainer.context import Context
from trainer.metrics_log import MetricsLog
from trainer.state import TrainingState

NAME = "negatives.csv"
COLUMNS = ("step", "order", "place", "view", "negative_place", "negative_view", "age", "cosine", "weight")
UNKNOWN = -1  # of a view
ROWS = 32  # of a table, a row for each of the batch's places
TABLES = 1000  # at the recipe's interval; each doubling of their number doubles it


def is_due(step: int, every: int) -> bool:
    """Whether a step (1 is the first) has a table: every `every` steps, more and more rarely after `TABLES` of them.

    A function of the step alone, so that a resumed training logs the same steps: 500 tables for each time that the
    training becomes twice as long.
    """
    number, rest = divmod(step, every)
    return not rest and number % (1 << ((number - 1) // TABLES).bit_length()) == 0


class QueueNegatives:
    """Finds the table of a step, and remembers which view each entry of the queue is of: on the host, for no wait.

    What a queue holds of before a resume has unknown views.
    """

    def __init__(self, recipe: Recipe, loss: GlobalLoss, state: TrainingState) -> None:
        self.every, self.memory, self.state = recipe.trainer.log_negatives_every, recipe.memory, state
        strategy = loss.strategy
        self.has_weights = isinstance(strategy, InTiles)
        self.near = strategy.near if isinstance(strategy, InTiles) else None
        data = recipe.data
        steps = math.ceil(self.memory.size / (data.places_per_batch * data.images_per_place))
        self._stored: deque[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = deque(maxlen=steps + 1)

    def found(self, out: GlobalLossOutput, batch: PlaceBatch, optimizer_step: int) -> str:
        """The table of a step, its batch not being stored yet, as lines of CSV; empty if none is due or found.

        Every rank must call this.
        """
        step, drift = self.state.progress.step + 1, self.state.drift
        if not is_due(step, self.every) or out.host_ids_N is None:
            return ""
        found = hardest_negatives(
            self.state.queue,
            out.descriptors_ND,
            out.host_ids_N,
            step=optimizer_step,
            most=ROWS,
            config=self.memory,
            curve_a2=drift.curve_a2 if drift else torch.zeros(0, 2),
            near=self.near,
            has_weights=self.has_weights,
        )
        return "".join(self._lines(found, batch, step, optimizer_step))

    def stored(self, batch: PlaceBatch, optimizer_step: int) -> None:
        """Takes note of the views of a batch that was put into the queue."""
        if batch.place_ids_N is not None and batch.views_N is not None:
            self._stored.append((optimizer_step, batch.place_ids_N.numpy(), batch.views_N.numpy()))

    def _lines(self, found: HardNegatives, batch: PlaceBatch, step: int, optimizer_step: int) -> list[str]:
        lines = []
        for n in range(len(found)):
            view = UNKNOWN if batch.views_N is None else int(batch.views_N[found.row_n[n]])
            stored = int(found.stored_n[n])
            negative_view = self._view(int(found.negative_n[n]), stored, int(found.newer_n[n]))
            pair = f"{found.place_n[n]},{view},{found.negative_n[n]},{negative_view}"
            how = f"{optimizer_step - stored},{found.cosine_n[n]:.6f},{found.weight_n[n]:.6g}"
            lines.append(f"{step},{n + 1},{pair},{how}\n")
        return lines

    def _view(self, place: int, stored: int, newer: int) -> int:
        """The view of an entry that has so many newer ones of its place and step behind it."""
        for step, ids_N, views_N in self._stored:
            if step == stored:
                views = views_N[ids_N == place]
                return int(views[-1 - newer]) if newer < len(views) else UNKNOWN
        return UNKNOWN


class NegativesTable:
    """Appends to `negatives.csv` of an output folder, as `metrics.jsonl` is appended to; see `trainer.metrics_log`."""

    def __init__(self, context: Context) -> None:
        self.path, self._tracker = context.recipe.output / NAME, context.tracker
        self._log = MetricsLog(self.path, context.say)
        self._is_main, self._unsent = context.rank.is_main, False

    def append(self, lines: str) -> None:
        """Writes the lines of one step, all or none of them; below the names of the columns in a new file."""
        if not (lines and self._is_main):
            return
        if not self._unsent and not (self.path.is_file() and self.path.stat().st_size):
            self._log.append_text(",".join(COLUMNS) + "\n", keep=True)
        self._log.append_text(lines)
        self._unsent = True

    def send(self) -> None:
        """The table as it is, to MLflow, if there is more of it than the last time."""
        if self._unsent:
            self._tracker.artifact(self.path)
        self._unsent = False
