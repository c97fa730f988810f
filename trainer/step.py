"""One training step: augment, encode, loss, backward, update, enqueue."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.host_copies import to_device
from configs.traced import part
from data_pipeline.augment import randaugment_of
from data_pipeline.images import normalise
from data_pipeline.loader import PlaceBatch
from memory.global_loss import GlobalLoss, GlobalLossOutput
from memory.gradient_cache import GradientCache
from trainer.batches import draw_augmentation
from trainer.context import Context
from trainer.engine import StepResult, clip_and_update, set_learning_rate
from trainer.guided import Guided, GuidedTerm
from trainer.negatives import QueueNegatives
from trainer.profile import waits_told
from trainer.state import TrainingState


@dataclass(frozen=True)
class StepOutcome:
    """What a step did with a global batch; the same on every rank."""

    loss: float
    grad_norm: float | None  # before clipping; None if the loss was not finite
    updated: bool  # whether weights changed
    queue_used: bool
    num_images: int  # of the global batch
    place_ids_N: torch.Tensor
    figures: dict[str, float]  # of the loss, the miner, the queue and its drift, by name
    votes: list[float]  # added up over ranks
    negatives: str = ""  # the step's part of negatives.csv


class TrainingStep:
    """Takes this rank's share of a global batch through the network, the loss and the optimizer, into the queue."""

    def __init__(self, context: Context, loss: GlobalLoss, state: TrainingState, *, steps_per_epoch: int) -> None:
        self.recipe, self.watchdog = context.recipe, context.watchdog
        self.loss, self.state, self.steps_per_epoch = loss, state, steps_per_epoch
        self.guided = GuidedTerm(self.recipe, state.model) if self.recipe.loss.guided_weight else None
        self.negatives = QueueNegatives(self.recipe, loss, state) if self.recipe.trainer.log_negatives_every else None

    def __call__(self, batch: PlaceBatch, lr: float, votes: Callable[[], Sequence[float]] = tuple) -> StepOutcome:
        """The step that `state.progress` stands at, with this learning rate; every rank must call this.

        Progress stays as it is. A loss or gradient that is not finite, on any rank, updates and enqueues nothing.
        `votes` is asked at the end for numbers that all ranks add up, as many on each.

        The host gives the device its work from the first image to the last weight and waits for it once, for all that
        it wants to know: so a loss that is not finite goes backward too, and makes every gradient NaN.
        """
        with waits_told(self.recipe.trainer.sync_debug, self.state.engine.device):
            return self._run(batch, lr, votes)

    def _run(self, batch: PlaceBatch, lr: float, votes: Callable[[], Sequence[float]]) -> StepOutcome:
        state, step = self.state, self.state.progress.step
        optimizer_step = state.progress.optimizer_step
        queue_used = self._uses_queue(step)
        self.watchdog.enter("forward", step)
        with part("augment"):
            images_B3HW = self._augmented(batch, step // self.steps_per_epoch)
        state.engine.train()
        figures = self._measured_drift(optimizer_step) if queue_used else {}
        chunks = self.recipe.engine.encode_chunks
        guided = None
        with self.guided.attached(images_B3HW) if self.guided else nullcontext():
            cache = GradientCache(self._encode_all, images_B3HW.tensor_split(chunks)) if chunks > 1 else None
            descriptors_BD, *local = cache.outputs if cache else self._encode_all(images_B3HW)
            self.watchdog.enter("loss", step)
            with part("loss"):
                out = self.loss(
                    descriptors_BD,
                    batch.place_ids_B,
                    state.queue,
                    step=optimizer_step,
                    drift_curve_a2=state.drift.curve_a2 if state.drift else None,
                    place_ids_N=batch.place_ids_N,
                )
            loss = out.loss
            if self.guided:
                assert batch.place_ids_N is not None  # a training knows its plan
                local_BNC, salient_BN = local
                with part("guided loss"):
                    guided = self.guided(local_BNC, salient_BN, batch.place_ids_B, batch.place_ids_N)
                loss = loss + guided.loss
            self.watchdog.enter("step", step)
            set_learning_rate(state.engine, lr)
            one = 1 + 0 * out.loss.detach()  # NaN if the loss is not finite
            result = self._backward(loss * one, cache)
        negatives = ""
        if result.updated and queue_used:
            with part("enqueue"):
                if self.negatives:
                    negatives = self.negatives.found(out, batch, optimizer_step)
                    self.negatives.stored(batch, optimizer_step)
                state.queue.enqueue(out.descriptors_ND, out.place_ids_N, optimizer_step, host_ids_N=out.host_ids_N)
                if state.drift:
                    state.drift.keep(images_B3HW, out.descriptors_ND, optimizer_step)
        with part("read the figures"):
            loss_read, norm, found, sums = self._read(out, guided, result, votes())
        figures |= found
        return StepOutcome(
            loss=loss_read,
            grad_norm=norm if math.isfinite(loss_read) else None,
            updated=result.updated,
            queue_used=queue_used,
            num_images=len(out.place_ids_N),
            place_ids_N=out.place_ids_N,
            figures=figures,
            votes=sums,
            negatives=negatives,
        )

    def _read(
        self, out: GlobalLossOutput, guided: Guided | None, result: StepResult, votes: Sequence[float]
    ) -> tuple[float, float, dict[str, float], list[float]]:
        """Loss, gradient norm, figures of the loss, and the votes of all ranks, by one all-reduce and one wait."""
        device = out.loss.device
        sums = to_device(torch.tensor(votes, dtype=torch.float32), device)
        if guided:
            sums = torch.cat([sums, guided.sums_4])
        if len(sums):
            dist.all_reduce(sums)
        norm = result.norm if isinstance(result.norm, torch.Tensor) else torch.full((), result.norm, device=device)
        numbers = torch.stack([one.double() for one in (out.loss.detach(), norm, *out.stats.values())])
        read = torch.cat([numbers, sums.double()]).tolist()
        loss, norm_read, *stats = read[: len(numbers)]
        figures, sums_read = dict(zip(out.stats, stats, strict=True)), read[len(numbers) :]
        if self.guided and guided:
            figures |= self.guided.figures(guided, sums_read[len(votes) :], len(out.place_ids_N))
            loss += self.guided.weight * figures["guided_loss"]
        return loss, norm_read, figures, sums_read[: len(votes)]

    def _uses_queue(self, step: int) -> bool:
        memory = self.recipe.memory
        return memory.size > 0 and step >= memory.start_epoch * self.steps_per_epoch

    def _augmented(self, batch: PlaceBatch, epoch: int) -> torch.Tensor:
        """The batch's uint8 images on this rank's device."""
        data = self.recipe.data
        images_B3HW = batch.images_B3HW.to(self.state.engine.device, non_blocking=True)
        if data.augmentation == "none":
            return images_B3HW
        drawn = batch.drawn or draw_augmentation(data, self.recipe.seed, epoch, batch.place_ids_B, batch.views_B)
        return randaugment_of(data.augment_ops, data.augment_magnitude).apply(images_B3HW, drawn)

    def _measured_drift(self, optimizer_step: int) -> dict[str, float]:
        drift = self.state.drift
        if not drift or not drift.due(optimizer_step):
            return {}
        with part("measure drift"):
            return drift.measure(self._encode, optimizer_step)

    def _encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 images -> descriptors."""
        with part("forward"):
            descriptors_BD: torch.Tensor = self.state.engine(normalise(images_B3HW))
        return descriptors_BD

    def _encode_all(self, images_B3HW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 images -> descriptors; with the guided loss also local features, and which of them are salient."""
        descriptors_BD = self._encode(images_B3HW)
        return (descriptors_BD, *self.guided.read()) if self.guided else (descriptors_BD,)

    def _backward(self, loss: torch.Tensor, cache: GradientCache | None) -> StepResult:
        """One optimizer step from the loss of the global batch, whole or chunk by chunk."""
        engine, clipping = self.state.engine, self.recipe.optim.gradient_clipping
        result: StepResult | None = None
        if cache is None:
            with part("backward"):
                engine.backward(loss)
            with part("optimizer"):
                result = clip_and_update(engine, clipping)
        else:

            def backward(share: torch.Tensor) -> None:
                nonlocal result
                with part("backward of a chunk"):
                    engine.backward(share, scale_wrt_gas=False)  # chunks add up to the batch: nothing to average
                with part("optimizer"):
                    result = clip_and_update(engine, clipping)  # updates after the last chunk

            with part("backward"):
                cache.backward(loss, backward)
        assert result is not None
        return result
