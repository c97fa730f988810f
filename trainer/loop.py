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
from eval.benchmarks import load_benchmarks
from eval.evaluate import FeatureStore, Result, evaluate
from eval.report import draw_pictures, write_results
from memory.drift import DriftProbe
from memory.global_loss import GlobalLoss, GlobalLossOutput
from memory.gradient_cache import GradientCache
from memory.queue import MemoryQueue
from model.network import PlaceModel, build_model
from trainer.checkpoint import (
    Progress,
    best_recall,
    find_checkpoint,
    load_checkpoint,
    newest_valid,
    point,
    prune,
    save_checkpoint,
    step_name,
)
from trainer.engine import build_engine, optimizer_step, set_learning_rate
from trainer.process_group import Rank
from trainer.progress import Update, progress_bar
from trainer.provenance import provenance
from trainer.schedule import learning_rate
from trainer.stop_signal import Stopped, StopSignal
from trainer.tracking import Tracker


class TrainingError(RuntimeError):
    """A training that must stop; the text says why, where, and what to do."""


@dataclass(frozen=True)
class Summary:
    """What a training leaves behind."""

    steps: int
    checkpoint: Path
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


class Training:
    """One training: its parts, and where it stands."""

    def __init__(self, recipe: Recipe, rank: Rank, console: Console, *, resume: bool) -> None:
        self.recipe, self.rank, self.console = recipe, rank, console
        self.stop_signal = StopSignal()
        self.asked_to_stop = False
        self.checkpoints = recipe.output / "checkpoints"
        places, world = recipe.data.places_per_batch, rank.world_size
        if places % world:
            low = max(world, places // world * world)
            raise ValueError(
                f"data.places_per_batch {places} is not divisible by {world} ranks; nearest: {low} or {low + world}"
            )
        found, notes = newest_valid(self.checkpoints)
        if found and not resume:
            raise ValueError(
                f"{recipe.output} already holds a training (up to {found.name}); add --resume or change --output"
            )
        images_per_rank = places // world * recipe.data.images_per_place
        if recipe.engine.gradient_accumulation > images_per_rank:
            raise ValueError(
                f"engine.gradient_accumulation {recipe.engine.gradient_accumulation} is more than the "
                f"{images_per_rank} images of a rank; it counts the chunks that these are encoded in"
            )
        self.loss = GlobalLoss(recipe.loss, recipe.memory)
        self.benchmarks = load_benchmarks(recipe.eval.benchmarks, recipe.eval.data_root)
        reader = build_reader(recipe.data, rank=rank.rank)
        places_of = read_mixture(recipe.data, reader)
        self.plans = EpochPlans(places_of, recipe.data, seed=recipe.seed)
        self.loader = PlaceLoader(places_of, recipe.data, rank=rank.rank, world_size=world, reader=reader)
        self.total_steps = recipe.trainer.epochs * self.plans.num_steps
        if recipe.trainer.max_steps:
            self.total_steps = min(self.total_steps, recipe.trainer.max_steps)

        model = build_model(recipe.model, seed=recipe.seed)
        memory = recipe.memory
        self.queue = MemoryQueue(memory.size, model.descriptor_size, rank.device, placement=memory.placement)
        self.drift = None
        if memory.size and memory.drift_every:
            self.drift = DriftProbe(
                every=memory.drift_every,
                num_images=memory.drift_images,
                queue_steps=math.ceil(memory.size / (places * recipe.data.images_per_place)),
                image_shape=(3, recipe.data.image_size, recipe.data.image_size),
                descriptor_size=model.descriptor_size,
                device=rank.device,
            )
        self.engine = build_engine(
            model,
            engine=recipe.engine,
            optim=recipe.optim,
            images_per_rank=images_per_rank,
        )
        self.progress = Progress()
        if self.loss.note:
            self.say(f"[yellow]{self.loss.note}")
        for note in notes:
            self.say(f"[yellow]left out: {note}")
        if found and resume:
            self.progress = load_checkpoint(found, self.engine, self.queue, self.drift, recipe)
            self.say(f"resumed from {found}, step {self.progress.step} of {self.total_steps}")
        self.bad_images_before = self.progress.bad_images
        self.tracker = Tracker(
            recipe,
            recipe.output,
            console,
            run_id=self.progress.mlflow_run_id,
            active=rank.is_main,
            facts=provenance(world_size=world, device=rank.device),
        )
        if rank.is_main:
            (recipe.output / "recipe.yaml").write_text(recipe_text(recipe))
            self.tracker.artifact(recipe.output / "recipe.yaml")
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.say(
                f"{recipe.name}: {recipe.model.backbone}, {trained / 1e6:.1f} M of "
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters trained; {places_of.num_places} "
                f"places, {self.plans.num_steps} steps an epoch, {self.total_steps} in all; {world} rank(s) on "
                f"{rank.device.type}, ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}"
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
        with progress_bar(self.console, "training", self.total_steps, active=self.rank.is_main) as update:
            for batch, waited_s in self._batches():
                self._step(batch, waited_s, update)
                self._after_step()
                if self._no_longer_better():
                    break
        if self._no_longer_better():
            self.say(f"{self.progress.evals_since_best} validations without a better recall: stopped early")
        results = self._evaluate("trained", rerank=True, pictures=self.recipe.output / "pictures")
        self._keep_if_best(results)
        checkpoint = find_checkpoint(self.checkpoints / "latest")
        if self.rank.is_main:
            path = self.recipe.output / "results.json"
            write_results(path, results, model=str(checkpoint), before=self.progress.before)
            self.tracker.artifact(path)
            self.tracker.model(find_checkpoint(self.checkpoints))
        self.tracker.close("FINISHED")
        return Summary(self.progress.step, checkpoint, self.progress.before, [result.as_dict() for result in results])

    def _batches(self) -> Iterator[tuple[PlaceBatch, float]]:
        while self.progress.step < self.total_steps and not self._no_longer_better():
            epoch, start = divmod(self.progress.step, self.plans.num_steps)
            stop = min(self.plans.num_steps, start + self.total_steps - self.progress.step)
            batches = self.loader.batches(self.plans.epoch(epoch), range(start, stop))
            asked = time.perf_counter()
            for batch in batches:
                yield batch, time.perf_counter() - asked
                asked = time.perf_counter()

    def _step(self, batch: PlaceBatch, waited_s: float, update: Update) -> None:
        """One optimizer step on this rank's share of a global batch."""
        began = time.perf_counter()
        recipe, progress = self.recipe, self.progress
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
        out = self.loss(
            cache.descriptors_BD if cache else self._encode(images),
            place_ids,
            self.queue,
            step=optimizer_step,
            drift_curve_a2=self.drift.curve_a2 if self.drift else None,
        )
        names, sums = ["loss", *out.stats], [out.loss.detach(), *out.stats.values()]
        values |= dict(zip(names, torch.stack([value.double() for value in sums]).tolist(), strict=True))
        said = torch.tensor([self.loader.num_bad_images, bool(self.stop_signal.name)], device=self.rank.device)
        dist.all_reduce(said)
        bad_images, asked_to_stop = said.tolist()
        self.asked_to_stop = asked_to_stop > 0
        lr = learning_rate(
            progress.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.plans.num_steps,
            optim=recipe.optim,
        )
        if math.isfinite(values["loss"]):
            set_learning_rate(self.engine, lr)
            norm = self._backward(out, cache)
            if norm is not None:
                values["grad_norm"] = norm
                self._check_gradient(norm)
            if uses_queue:
                self.queue.enqueue(out.descriptors_ND, out.place_ids_N, optimizer_step)
                if self.drift:
                    self.drift.keep(images, out.descriptors_ND, optimizer_step)
        else:
            self._skip(values["loss"], out.place_ids_N)
        progress.step += 1
        seconds = time.perf_counter() - began + waited_s
        num_images = len(images) * self.rank.world_size
        values |= {
            "epoch": float(epoch),
            "lr": lr,
            "images_per_s": num_images / seconds,
            "data_wait_s": waited_s,
            "step_s": seconds,
            "skipped_steps": float(progress.skipped_steps),
            "bad_images": float(self.bad_images_before + bad_images),
        }
        progress.bad_images = self.bad_images_before + bad_images
        if progress.step % recipe.trainer.log_every_steps == 0:
            self.tracker.metrics({f"train/{name}": value for name, value in values.items()}, progress.step)
        queue = f"queue {len(self.queue)}" if uses_queue else "queue off"
        update(progress.step, note=f"loss {values['loss']:.3f}  {values['images_per_s']:.0f} images/s  {queue}")

    def _skip(self, loss: float, place_ids_N: torch.Tensor) -> None:
        """Counts a step whose loss is not finite, and writes down its places."""
        progress, trainer = self.progress, self.recipe.trainer
        progress.skipped_steps += 1
        record = self.recipe.output / "skipped_steps.jsonl"
        if self.rank.is_main:
            with record.open("a") as file:
                places = place_ids_N.unique().tolist()
                file.write(json.dumps({"step": progress.step, "loss": str(loss), "place_ids": places}) + "\n")
        self.say(f"[yellow]step {progress.step}: loss is {loss}; step skipped, its places are in {record}")
        if progress.skipped_steps > trainer.max_skipped_steps:
            raise TrainingError(
                f"step {progress.step}: {progress.skipped_steps} steps had a non-finite loss, more than "
                f"trainer.max_skipped_steps; their places are in {record}; lower optim.lr or use engine.precision bf16"
            )

    def _check_gradient(self, norm: float) -> None:
        """Ends the run before a gradient that is not finite reaches a checkpoint; fp16's scaler handles its own."""
        if not math.isfinite(norm) and self.recipe.engine.precision != "fp16":
            raise TrainingError(
                f"step {self.progress.step}: the gradient norm is {norm} though the loss is finite, so the weights are "
                "lost; the last checkpoint is whole: --resume with a lower optim.lr or with optim.gradient_clipping"
            )

    def _encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 images -> descriptors."""
        descriptors_BD: torch.Tensor = self.engine(normalise(images_B3HW))
        return descriptors_BD

    def _backward(self, out: GlobalLossOutput, cache: GradientCache | None) -> float | None:
        """One optimizer step from the loss of the global batch, whole or chunk by chunk; the gradient's norm."""
        if cache is None:
            self.engine.backward(out.loss)
            return optimizer_step(self.engine)
        norm = None

        def backward(part: torch.Tensor) -> None:
            nonlocal norm
            self.engine.backward(part, scale_wrt_gas=False)  # chunks add up to the batch: nothing to average
            norm = optimizer_step(self.engine)  # updates after the last chunk

        cache.backward(out.loss, backward)
        return norm

    def _after_step(self) -> None:
        """Checkpoint and validation, where they are due."""
        trainer, step = self.recipe.trainer, self.progress.step
        epoch, into_epoch = divmod(step, self.plans.num_steps)
        last = step == self.total_steps
        due = step % trainer.checkpoint_every_steps == 0 if trainer.checkpoint_every_steps else into_epoch == 0
        if due or last or self.asked_to_stop:
            self._save()
        if self.asked_to_stop and not last:
            raise Stopped(f"asked to stop; saved at step {step} of {self.total_steps}, --resume goes on from there")
        every = trainer.validate_every_epochs
        if every and into_epoch == 0 and epoch % every == 0 and not last:
            self._keep_if_best(self._evaluate(f"epoch {epoch}", rerank=False))

    def _no_longer_better(self) -> bool:
        """Whether the recipe's number of validations in a row brought no better recall."""
        patience = self.recipe.trainer.early_stop_evals
        return 0 < patience <= self.progress.evals_since_best

    def _save(self) -> Path:
        self.tracker.flush()  # a killed run goes on from here, and its curves with it
        self.progress.mlflow_run_id = self.tracker.run_id
        path = save_checkpoint(self.checkpoints, self.engine, self.queue, self.drift, self.progress, self.recipe)
        if self.rank.is_main:
            prune(self.checkpoints, self.recipe.trainer.keep_last)
        return path

    def _keep_if_best(self, results: list[Result]) -> None:
        """Points `best` at the present step if its mean first-stage recall at the smallest K is the highest."""
        if not results:
            return
        k = self.recipe.eval.recall_at[0]
        recall = sum(result.recall[k] for result in results) / len(results)
        best = best_recall(self.checkpoints)
        dist.barrier()  # every rank has read it
        self.progress.evals_since_best = 0 if recall > best else self.progress.evals_since_best + 1
        if recall > best:
            path = self.checkpoints / step_name(self.progress.step)
            if not path.exists():
                path = self._save()
            if self.rank.is_main:
                point(self.checkpoints / "best", path, recall)
        dist.barrier()

    def _evaluate(self, label: str, *, rerank: bool, pictures: Path | None = None) -> list[Result]:
        """All benchmarks with the present weights; recalls and timings go to the tracker."""
        config = self.recipe.eval
        if not rerank:
            config = config.model_copy(update={"rerank": config.rerank.model_copy(update={"enabled": False})})
        results, store = [], FeatureStore(self.benchmarks)
        for benchmark in self.benchmarks:
            with progress_bar(self.console, f"{label}: {benchmark.name}", active=self.rank.is_main) as update:
                result = evaluate(self.model, benchmark, config, on_progress=update, store=store)
            results.append(result)
            self.say(f"{label}: {result.line()}")
            params = {"benchmark": benchmark.name, "protocol": result.protocol, "weights": label, "rerank": rerank}
            self.tracker.evaluation(benchmark.name, self.progress.step, params, result.metrics())
            if pictures and self.rank.is_main:
                for picture in draw_pictures(pictures / benchmark.name, benchmark, result, self.model, config):
                    self.tracker.artifact(picture, f"pictures/{benchmark.name}")
        return results


def train(recipe: Recipe, rank: Rank, console: Console, *, resume: bool) -> Summary:
    """Trains a recipe on all ranks, from the newest valid checkpoint if `resume`, and evaluates it before and after."""
    training = Training(recipe, rank, console, resume=resume)
    try:
        with training.stop_signal:
            return training.run()
    except BaseException as error:
        training.tracker.close("KILLED" if isinstance(error, KeyboardInterrupt | Stopped) else "FAILED")
        raise
