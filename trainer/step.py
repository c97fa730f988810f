"""One training step: augment, encode, loss, backward, update, enqueue."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from data_pipeline.augment import image_seeds, randaugment
from data_pipeline.images import normalise
from data_pipeline.loader import PlaceBatch
from memory.global_loss import GlobalLoss, GlobalLossOutput
from memory.gradient_cache import GradientCache
from trainer.context import Context
from trainer.engine import StepResult, clip_and_update, set_learning_rate
from trainer.state import TrainingState


@dataclass(frozen=True)
class StepOutcome:
    """What a step did with a global batch; the same on every rank."""

    loss: float
    grad_norm: float | None  # before clipping; None if the loss was not finite, and nothing went backward
    updated: bool  # whether weights changed
    queue_used: bool
    num_images: int  # of the global batch
    place_ids_N: torch.Tensor
    figures: dict[str, float]  # of the loss, the miner, the queue and its drift, by name


class TrainingStep:
    """Takes this rank's share of a global batch through the network, the loss and the optimizer, into the queue."""

    def __init__(self, context: Context, loss: GlobalLoss, state: TrainingState, *, steps_per_epoch: int) -> None:
        self.recipe, self.watchdog = context.recipe, context.watchdog
        self.loss, self.state, self.steps_per_epoch = loss, state, steps_per_epoch

    def __call__(self, batch: PlaceBatch, lr: float) -> StepOutcome:
        """The step that `state.progress` stands at, with this learning rate; every rank must call this.

        Progress stays as it is. A loss or gradient that is not finite, on any rank, updates and enqueues nothing.
        """
        state, step = self.state, self.state.progress.step
        optimizer_step = state.progress.optimizer_step
        queue_used = self._uses_queue(step)
        self.watchdog.enter("forward", step)
        images_B3HW = self._augmented(batch, step // self.steps_per_epoch)
        state.engine.train()
        figures = self._measured_drift(optimizer_step) if queue_used else {}
        chunks = self.recipe.engine.encode_chunks
        cache = GradientCache(self._encode, images_B3HW.tensor_split(chunks)) if chunks > 1 else None
        descriptors_BD = cache.descriptors_BD if cache else self._encode(images_B3HW)
        self.watchdog.enter("loss", step)
        out = self.loss(
            descriptors_BD,
            batch.place_ids_B.to(images_B3HW.device),
            state.queue,
            step=optimizer_step,
            drift_curve_a2=state.drift.curve_a2 if state.drift else None,
        )
        read = torch.stack([out.loss.detach().double(), *(value.double() for value in out.stats.values())]).tolist()
        figures |= dict(zip(out.stats, read[1:], strict=True))
        self.watchdog.enter("step", step)
        result = None
        if math.isfinite(read[0]):
            set_learning_rate(state.engine, lr)
            result = self._backward(out, cache)
        updated = result is not None and result.updated
        if updated and queue_used:
            state.queue.enqueue(out.descriptors_ND, out.place_ids_N, optimizer_step)
            if state.drift:
                state.drift.keep(images_B3HW, out.descriptors_ND, optimizer_step)
        return StepOutcome(
            loss=read[0],
            grad_norm=result.norm if result else None,
            updated=updated,
            queue_used=queue_used,
            num_images=len(out.place_ids_N),
            place_ids_N=out.place_ids_N,
            figures=figures,
        )

    def _uses_queue(self, step: int) -> bool:
        memory = self.recipe.memory
        return memory.size > 0 and step >= memory.start_epoch * self.steps_per_epoch

    def _augmented(self, batch: PlaceBatch, epoch: int) -> torch.Tensor:
        """The batch's uint8 images on this rank's device."""
        data = self.recipe.data
        images_B3HW = batch.images_B3HW.to(self.state.engine.device, non_blocking=True)
        if data.augmentation == "none":
            return images_B3HW
        seeds = image_seeds(self.recipe.seed, epoch, batch.place_ids_B, batch.views_B)
        return randaugment(images_B3HW, seeds, num_ops=data.augment_ops, magnitude=data.augment_magnitude)

    def _measured_drift(self, optimizer_step: int) -> dict[str, float]:
        drift = self.state.drift
        return drift.measure(self._encode, optimizer_step) if drift and drift.due(optimizer_step) else {}

    def _encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 images -> descriptors."""
        descriptors_BD: torch.Tensor = self.state.engine(normalise(images_B3HW))
        return descriptors_BD

    def _backward(self, out: GlobalLossOutput, cache: GradientCache | None) -> StepResult:
        """One optimizer step from the loss of the global batch, whole or chunk by chunk."""
        engine, clipping = self.state.engine, self.recipe.optim.gradient_clipping
        result: StepResult | None = None
        if cache is None:
            engine.backward(out.loss)
            result = clip_and_update(engine, clipping)
        else:

            def backward(part: torch.Tensor) -> None:
                nonlocal result
                engine.backward(part, scale_wrt_gas=False)  # chunks add up to the batch: nothing to average
                result = clip_and_update(engine, clipping)  # updates after the last chunk

            cache.backward(out.loss, backward)
        assert result is not None
        return result
