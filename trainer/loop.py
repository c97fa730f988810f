"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from configs.load import recipe_text
from configs.schema import Recipe
from data_pipeline.augment import image_seeds, randaugment
from data_pipeline.images import normalise
from data_pipeline.loader import PlaceBatch, PlaceLoader, build_reader
from data_pipeline.mixture import EpochPlans, read_mixture
from eval.evaluate import Result
from eval.report.tables import write_results
from memory.drift import DriftProbe
from memory.global_loss import GlobalLoss, GlobalLossOutput
from memory.gradient_cache import GradientCache
from memory.queue import MemoryQueue
from model.network import PlaceModel, build_model
from trainer.checkpoint import (
    Progress,
    checkpoint_contents,
    choose_checkpoint,
    find_checkpoint,
    load_checkpoint,
    point,
    set_aside_newer,
    step_name,
)
from trainer.checkpoint_writer import CheckpointWriter
from trainer.engine import StepResult, build_engine, clip_and_update, partitioner, set_learning_rate, whole_numel
from trainer.flops import device_peak_tflops, model_flops
from trainer.process_group import Rank
from trainer.progress import Update, progress_bar
from trainer.provenance import provenance
from trainer.schedule import learning_rate, validations_since_best
from trainer.stop_signal import Stopped, StopSignal
from trainer.tracking import Tracker
from trainer.validation import Validation, agreed_best_recall
from trainer.watchdog import Watchdog

SAVE_AGAIN_S = 5.0


class TrainingError(RuntimeError):
    """A training that must stop; the text says why, where, and what to do."""


@dataclass(frozen=True)
class Resume:
    """Where to go on: from `checkpoint`, or the newest valid one of the output folder, or the start if it has none."""

    checkpoint: Path | None = None


@dataclass(frozen=True)
class Summary:
    """What a training leaves behind."""

    steps: int
    checkpoint: Path
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


class Training:
    """One training: its parts, and where it stands."""

    def __init__(self, recipe: Recipe, rank: Rank, console: Console, *, resume: Resume | None) -> None:
        self.recipe, self.rank, self.console = recipe, rank, console
        self.stop_signal = StopSignal()
        self.asked_to_stop = False
        self.checkpoints = recipe.output / "checkpoints"
        images_per_rank = self._check_sizes()
        found, notes = choose_checkpoint(self.checkpoints, resume.checkpoint if resume else None)
        if found and not resume:
            raise ValueError(
                f"{recipe.output} already holds a training (up to {found.name}); add --resume or change --output"
            )
        self.loss = GlobalLoss(recipe.loss, recipe.memory)
        self.validation = Validation(recipe.eval, console)
        reader = build_reader(recipe.data, rank=rank.rank)
        places_of = read_mixture(recipe.data, reader)
        self.plans = EpochPlans(places_of, recipe.data, seed=recipe.seed)
        self.loader = PlaceLoader(places_of, recipe.data, rank=rank.rank, world_size=rank.world_size, reader=reader)
        self.total_steps = recipe.trainer.epochs * self.plans.num_steps
        if recipe.trainer.max_steps:
            self.total_steps = min(self.total_steps, recipe.trainer.max_steps)

        model: PlaceModel = build_model(recipe.model, seed=recipe.seed, shard=partitioner(recipe.engine))
        model.activation_checkpointing = recipe.engine.activation_checkpointing
        self.queue = MemoryQueue(
            recipe.memory.size, model.descriptor_size, rank.device, placement=recipe.memory.placement
        )
        self.drift = self._drift_probe(model.descriptor_size)
        self.engine = build_engine(model, engine=recipe.engine, optim=recipe.optim, images_per_rank=images_per_rank)
        model.cast_frozen()  # DeepSpeed has cast all of it
        if recipe.engine.compile:
            model.compile_blocks()
        torch.manual_seed(recipe.seed + rank.rank)
        self.progress = Progress()
        if self.loss.note:
            self.say(f"[yellow]{self.loss.note}")
        for note in notes:
            self.say(f"[yellow]left out: {note}")
        if resume and found:
            self.progress = load_checkpoint(found, self.engine, self.queue, self.drift, recipe, places_of.digest)
            self.say(f"resumed from {found}, step {self.progress.step} of {self.total_steps}")
        self.progress.dataset = places_of.digest
        if resume and rank.is_main:
            set_aside_newer(self.checkpoints, found)
        self.bad_images_before = self.progress.bad_images
        self.writer = CheckpointWriter(self.checkpoints, keep_last=recipe.trainer.keep_last, say=self.say)
        self.tracker = Tracker(
            recipe,
            recipe.output,
            console,
            run_id=self.progress.mlflow_run_id,
            active=rank.is_main,
            facts=provenance(world_size=rank.world_size, device=rank.device, data_digest=places_of.digest),
        )
        if rank.is_main:
            (recipe.output / "recipe.yaml").write_text(recipe_text(recipe))
            self.tracker.artifact(recipe.output / "recipe.yaml")
        numel = [(whole_numel(p), p.requires_grad) for p in model.parameters()]
        self.say(
            f"{recipe.name}: {recipe.model.backbone}, {sum(n for n, trained in numel if trained) / 1e6:.1f} M of "
            f"{sum(n for n, _ in numel) / 1e6:.1f} M parameters trained; {places_of.num_places} "
            f"places, {self.plans.num_steps} steps an epoch, {self.total_steps} in all; {rank.world_size} rank(s) on "
            f"{rank.device.type}, ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}"
        )
        peak = device_peak_tflops(recipe)
        self.seconds_at_peak = images_per_rank * model_flops(recipe) / (peak * 1e12) if peak else None
        self.watchdog = Watchdog(
            limit_s=recipe.engine.stall_s, first_limit_s=recipe.engine.timeout_s, folder=recipe.output
        )

    def _check_sizes(self) -> int:
        """Images of a rank in a step; raises ValueError where they do not come out even."""
        recipe, world = self.recipe, self.rank.world_size
        places, chunks = recipe.data.places_per_batch, recipe.engine.gradient_accumulation
        if places % world:
            low = max(world, places // world * world)
            raise ValueError(
                f"data.places_per_batch {places} is not divisible by {world} ranks; nearest: {low} or {low + world}"
            )
        images = places // world * recipe.data.images_per_place
        if chunks > images:
            raise ValueError(
                f"engine.gradient_accumulation {chunks} is more than the {images} images of a rank; it counts the "
                "chunks that these are encoded in"
            )
        return images

    def _drift_probe(self, descriptor_size: int) -> DriftProbe | None:
        memory, data = self.recipe.memory, self.recipe.data
        if not (memory.size and memory.drift_every):
            return None
        return DriftProbe(
            every=memory.drift_every,
            num_images=memory.drift_images,
            queue_steps=math.ceil(memory.size / (data.places_per_batch * data.images_per_place)),
            image_shape=(3, data.image_size, data.image_size),
            descriptor_size=descriptor_size,
            device=self.rank.device,
        )

    def say(self, text: str) -> None:
        """Prints on rank 0."""
        if self.rank.is_main:
            self.console.print(text, highlight=False, soft_wrap=True)

    @property
    def model(self) -> PlaceModel:
        """The network inside the engine."""
        model: PlaceModel = self.engine.module
        return model

    def run(self) -> Summary:
        """Trains to the end from wherever it stands; every rank calls this."""
        if self.progress.step == 0:
            self.progress.before = [result.as_dict() for result in self._evaluate("untrained", rerank=True)]
        self._validate_if_due()  # a run killed in a validation goes on with it
        with progress_bar(self.console, "training", self.total_steps, active=self.rank.is_main) as update:
            for batch, waited_s in self._batches():
                self._step(batch, waited_s, update)
                self._save_if_due()
                self._validate_if_due()
        if self._no_longer_better():
            since = validations_since_best(self.progress.recalls.values())
            self.say(f"{since} validations without a better recall: stopped early")
        self._save_at_the_end()
        results = self._evaluate("trained", rerank=True, pictures=self.recipe.output / "pictures")
        self._keep_if_best(results)
        checkpoint = find_checkpoint(self.checkpoints / "latest")
        if self.rank.is_main:
            path = self.recipe.output / "results.json"
            try:
                write_results(path, results, model=str(checkpoint), before=self.progress.before)
                self.tracker.artifact(path)
            except OSError as error:
                self.say(f"[yellow]results could not be written to {path} ({error}); they are printed above")
            self.tracker.model(find_checkpoint(self.checkpoints))
        return Summary(self.progress.step, checkpoint, self.progress.before, [result.as_dict() for result in results])

    def _batches(self) -> Iterator[tuple[PlaceBatch, float]]:
        while self.progress.step < self.total_steps and not self._no_longer_better():
            epoch, start = divmod(self.progress.step, self.plans.num_steps)
            stop = min(self.plans.num_steps, start + self.total_steps - self.progress.step)
            batches = iter(self.loader.batches(self.plans.epoch(epoch), range(start, stop)))
            while True:
                self.watchdog.enter("data", self.progress.step)
                asked = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                yield batch, time.perf_counter() - asked
                if self._no_longer_better():
                    return

    def _step(self, batch: PlaceBatch, waited_s: float, update: Update) -> None:
        """One optimizer step on this rank's share of a global batch."""
        began = time.perf_counter()
        recipe, progress = self.recipe, self.progress
        self.watchdog.enter("forward", progress.step)
        epoch = progress.step // self.plans.num_steps
        # Skipped steps update nothing, so they age nothing either.
        optimizer_step = progress.step - progress.skipped_steps
        uses_queue = recipe.memory.size > 0 and progress.step >= recipe.memory.start_epoch * self.plans.num_steps
        images = batch.images_B3HW.to(self.rank.device, non_blocking=True)
        place_ids = batch.place_ids_B.to(self.rank.device)
        if recipe.data.augmentation == "randaugment":
            seeds = image_seeds(recipe.seed, epoch, batch.place_ids_B, batch.views_B)
            images = randaugment(
                images, seeds, num_ops=recipe.data.augment_ops, magnitude=recipe.data.augment_magnitude
            )
        self.engine.train()
        values: dict[str, float] = {}
        if self.drift and uses_queue and self.drift.due(optimizer_step):
            values |= self.drift.measure(self._encode, optimizer_step)
        chunks = recipe.engine.gradient_accumulation
        cache = GradientCache(self._encode, images.tensor_split(chunks)) if chunks > 1 else None
        descriptors = cache.descriptors_BD if cache else self._encode(images)
        self.watchdog.enter("loss", progress.step)
        out = self.loss(
            descriptors,
            place_ids,
            self.queue,
            step=optimizer_step,
            drift_curve_a2=self.drift.curve_a2 if self.drift else None,
        )
        names, sums = ["loss", *out.stats], [out.loss.detach(), *out.stats.values()]
        values |= dict(zip(names, torch.stack([value.double() for value in sums]).tolist(), strict=True))
        bad_images = self._agree()
        lr = learning_rate(
            progress.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.plans.num_steps,
            optim=recipe.optim,
            recalls=progress.recalls.values(),
        )
        self.watchdog.enter("step", progress.step)
        result = None
        if math.isfinite(values["loss"]):
            set_learning_rate(self.engine, lr)
            result = self._backward(out, cache)
            values["grad_norm"] = result.norm
        if result and result.updated:
            if uses_queue:
                self.queue.enqueue(out.descriptors_ND, out.place_ids_N, optimizer_step)
                if self.drift:
                    self.drift.keep(images, out.descriptors_ND, optimizer_step)
        else:
            self._skip(values, out.place_ids_N)
        progress.step += 1
        seconds = time.perf_counter() - began + waited_s
        num_images = len(images) * self.rank.world_size
        progress.bad_images = self.bad_images_before + bad_images
        values |= {
            "epoch": float(epoch),
            "lr": lr,
            "images_per_s": num_images / seconds,
            "data_wait_s": waited_s,
            "step_s": seconds,
            "skipped_steps": float(progress.skipped_steps),
            "bad_images": float(progress.bad_images),
        }
        if self.seconds_at_peak:
            values["mfu"] = self.seconds_at_peak / seconds
        if progress.step % recipe.trainer.log_every_steps == 0:
            self.tracker.metrics({f"train/{name}": value for name, value in values.items()}, progress.step)
        queue = f"queue {len(self.queue)}" if uses_queue else "queue off"
        update(progress.step, note=f"loss {values['loss']:.3f}  {values['images_per_s']:.0f} images/s  {queue}")

    def _agree(self) -> int:
        """What ranks tell each other in each step: who was asked to stop, who has written its part of a checkpoint.

        Returns the bad images of all ranks.
        """
        mine = [self.loader.num_bad_images, bool(self.stop_signal.name), *self.writer.vote()]
        said = torch.tensor(mine, dtype=torch.float32, device=self.rank.device)
        dist.all_reduce(said)
        bad_images, asked_to_stop, written, failed = said.tolist()
        self.asked_to_stop = asked_to_stop > 0
        self.writer.settle(written, failed)
        return int(bad_images)

    def _skip(self, values: dict[str, float], place_ids_N: torch.Tensor) -> None:
        """Counts a step whose loss or gradient is not finite, and writes down its places."""
        progress, trainer = self.progress, self.recipe.trainer
        progress.skipped_steps += 1
        finite = math.isfinite(values["loss"])
        what = "the gradient is not finite" if finite else f"loss is {values['loss']}"
        if finite and self.recipe.engine.precision == "fp16":
            return  # the loss scaler looks for its scale in this way
        record = self.recipe.output / "skipped_steps.jsonl"
        if self.rank.is_main:
            places = place_ids_N.unique().tolist()
            line = {"step": progress.step, "loss": str(values["loss"]), "why": what, "place_ids": places}
            try:
                with record.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.say(f"[yellow]{record} cannot be written ({error}): {line}")
        self.say(f"[yellow]step {progress.step}: {what}; step skipped, its places are in {record}")
        if progress.skipped_steps > trainer.max_skipped_steps:
            raise TrainingError(
                f"step {progress.step}: {progress.skipped_steps} steps had a loss or gradient that is not finite, more "
                f"than trainer.max_skipped_steps; their places are in {record}; lower optim.lr or use engine.precision "
                "bf16"
            )

    def _encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 images -> descriptors."""
        descriptors_BD: torch.Tensor = self.engine(normalise(images_B3HW))
        return descriptors_BD

    def _backward(self, out: GlobalLossOutput, cache: GradientCache | None) -> StepResult:
        """One optimizer step from the loss of the global batch, whole or chunk by chunk."""
        clipping = self.recipe.optim.gradient_clipping
        result: StepResult | None = None
        if cache is None:
            self.engine.backward(out.loss)
            result = clip_and_update(self.engine, clipping)
        else:

            def backward(part: torch.Tensor) -> None:
                nonlocal result
                self.engine.backward(part, scale_wrt_gas=False)  # chunks add up to the batch: nothing to average
                result = clip_and_update(self.engine, clipping)  # updates after the last chunk

            cache.backward(out.loss, backward)
        assert result is not None
        return result

    def _save_if_due(self) -> None:
        """Checkpoint at the recipe's interval, at the end of an epoch, or because the run was asked to stop."""
        trainer, step = self.recipe.trainer, self.progress.step
        every = trainer.checkpoint_every_steps or self.plans.num_steps
        last = step == self.total_steps
        if step % every == 0 or last or self.asked_to_stop:
            self._save()
        if self.asked_to_stop and not last:
            saved = self.writer.finish()
            where = f"saved at step {step} of {self.total_steps}" if saved else f"step {step} could not be saved"
            raise Stopped(f"asked to stop; {where}, --resume goes on from the last checkpoint")

    def _save(self) -> None:
        """Begins to write a checkpoint of the present step; it is valid some steps later."""
        self.watchdog.enter("save", self.progress.step)
        self.tracker.flush()  # a killed run goes on from here, and its curves with it
        self.progress.mlflow_run_id = self.tracker.run_id
        contents = checkpoint_contents(self.engine, self.queue, self.drift, self.progress, self.recipe)
        self.writer.begin(self.progress.step, contents)

    def _is_saved(self) -> bool:
        """Whether the checkpoint of the present step is there, as rank 0 sees it."""
        self.writer.finish()
        holder = [(self.checkpoints / step_name(self.progress.step)).exists()]
        dist.broadcast_object_list(holder)
        return holder[0]

    def _save_at_the_end(self) -> None:
        """The last checkpoint, tried again where the disk is full."""
        tries = math.ceil(self.recipe.trainer.save_retry_s / SAVE_AGAIN_S)
        while not self._is_saved():
            if tries < 0:
                raise TrainingError(
                    f"the checkpoint of the last step, {self.progress.step}, could not be written for "
                    f"{self.recipe.trainer.save_retry_s:g} s; make room and go on with --resume"
                )
            if tries < math.ceil(self.recipe.trainer.save_retry_s / SAVE_AGAIN_S):
                self.say(f"[yellow]the last checkpoint is tried again in {SAVE_AGAIN_S:g} s")
                time.sleep(SAVE_AGAIN_S)
            tries -= 1
            self._save()

    def _validate_if_due(self) -> None:
        """Validation at the recipe's interval, once a step; not at the last step, whose evaluation is the final one."""
        step, every = self.progress.step, self.recipe.trainer.validate_every_epochs
        epoch, into_epoch = divmod(step, self.plans.num_steps)
        due = every and step and into_epoch == 0 and epoch % every == 0 and step < self.total_steps
        if due and str(step) not in self.progress.recalls:
            self._keep_if_best(self._evaluate(f"epoch {epoch}", rerank=False))

    def _no_longer_better(self) -> bool:
        """Whether the recipe's number of validations in a row brought no better recall."""
        patience = self.recipe.trainer.early_stop_evals
        return 0 < patience <= validations_since_best(self.progress.recalls.values())

    def _keep_if_best(self, results: list[Result]) -> None:
        """Notes the mean recall, and points `best` at the present step if it is the highest."""
        if not results:
            return
        recall = self.validation.mean_recall(results)
        self.progress.recalls[str(self.progress.step)] = recall
        if recall <= agreed_best_recall(self.checkpoints):
            return
        if not self._is_saved():
            self._save()
        if self._is_saved() and self.rank.is_main:
            point(self.checkpoints / "best", self.checkpoints / step_name(self.progress.step), recall)

    def _evaluate(self, label: str, *, rerank: bool, pictures: Path | None = None) -> list[Result]:
        """All benchmarks with the present weights."""
        return self.validation.run(
            self.engine,
            self.tracker,
            self.watchdog,
            label=label,
            step=self.progress.step,
            rerank=rerank,
            pictures=pictures,
        )


def train(recipe: Recipe, rank: Rank, console: Console, *, resume: Resume | None) -> Summary:
    """Trains a recipe on all ranks, from a checkpoint if `resume`, and evaluates it before and after."""
    training = Training(recipe, rank, console, resume=resume)
    try:
        with training.stop_signal, training.watchdog:
            summary = training.run()
    except BaseException as error:
        training.tracker.close("KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")
        raise
    training.tracker.close("FINISHED")  # may wait for MLflow
    return summary
