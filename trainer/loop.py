"""The training loop."""

from __future__ import annotations

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
from memory.global_loss import global_loss
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
from trainer.engine import build_engine, set_learning_rate
from trainer.process_group import Rank
from trainer.progress import Update, progress_bar
from trainer.schedule import learning_rate
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
        self.benchmarks = load_benchmarks(recipe.eval.benchmarks, recipe.eval.data_root)
        reader = build_reader(recipe.data, rank=rank.rank)
        places_of = read_mixture(recipe.data, reader)
        self.plans = EpochPlans(places_of, recipe.data, seed=recipe.seed)
        self.loader = PlaceLoader(places_of, recipe.data, rank=rank.rank, world_size=world, reader=reader)
        self.total_steps = recipe.trainer.epochs * self.plans.num_steps
        if recipe.trainer.max_steps:
            self.total_steps = min(self.total_steps, recipe.trainer.max_steps)

        model = build_model(recipe.model, seed=recipe.seed)
        self.queue = MemoryQueue(recipe.memory.size, model.descriptor_size, rank.device)
        self.engine = build_engine(
            model,
            engine=recipe.engine,
            optim=recipe.optim,
            images_per_rank=places // world * recipe.data.images_per_place,
        )
        self.progress = Progress()
        for note in notes:
            self.say(f"[yellow]left out: {note}")
        if found and resume:
            self.progress = load_checkpoint(found, self.engine, self.queue, recipe)
            self.say(f"resumed from {found}, step {self.progress.step} of {self.total_steps}")
        self.bad_images_before = self.progress.bad_images
        self.tracker = Tracker(recipe, recipe.output, console, run_id=self.progress.mlflow_run_id, active=rank.is_main)
        self.progress.mlflow_run_id = self.tracker.run_id
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
        results = self._evaluate("trained", rerank=True, pictures=self.recipe.output / "pictures")
        self._keep_if_best(results)
        checkpoint = find_checkpoint(self.checkpoints / "latest")
        if self.rank.is_main:
            path = self.recipe.output / "results.json"
            write_results(path, results, model=str(checkpoint), before=self.progress.before)
            self.tracker.artifact(path)
        self.tracker.close("FINISHED")
        return Summary(self.progress.step, checkpoint, self.progress.before, [result.as_dict() for result in results])

    def _batches(self) -> Iterator[tuple[PlaceBatch, float]]:
        while self.progress.step < self.total_steps:
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
        out = global_loss(
            self.engine(normalise(images)),
            place_ids,
            self.queue,
            step=optimizer_step,
            loss=recipe.loss,
            memory=recipe.memory,
        )
        names = ["loss", *out.stats]
        counts = torch.tensor([float(self.loader.num_bad_images)], device=self.rank.device)
        totals = torch.cat([torch.stack([out.loss.detach(), *out.stats.values()]).float(), counts])
        dist.all_reduce(totals)
        *means, bad_images = totals.tolist()
        values = {name: mean / self.rank.world_size for name, mean in zip(names, means, strict=True)}
        lr = learning_rate(
            progress.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.plans.num_steps,
            optim=recipe.optim,
        )
        if math.isfinite(values["loss"]):
            set_learning_rate(self.engine, lr)
            self.engine.backward(out.loss)
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            if norm is not None:
                values["grad_norm"] = float(norm)
            if uses_queue:
                self.queue.enqueue(out.descriptors_ND, out.place_ids_N, optimizer_step)
        else:
            progress.skipped_steps += 1
            self.say(f"[yellow]step {progress.step}: loss is {values['loss']} on some rank; step skipped on all")
            if progress.skipped_steps > recipe.trainer.max_skipped_steps:
                raise TrainingError(
                    f"step {progress.step}: {progress.skipped_steps} steps had a non-finite loss, more than "
                    "trainer.max_skipped_steps; lower optim.lr or use engine.precision bf16"
                )
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
            "bad_images": self.bad_images_before + bad_images,
        }
        progress.bad_images = int(self.bad_images_before + bad_images)
        if progress.step % recipe.trainer.log_every_steps == 0:
            self.tracker.metrics({f"train/{name}": value for name, value in values.items()}, progress.step)
        queue = f"queue {len(self.queue)}" if uses_queue else "queue off"
        update(progress.step, note=f"loss {values['loss']:.3f}  {values['images_per_s']:.0f} images/s  {queue}")

    def _after_step(self) -> None:
        """Checkpoint and validation, where they are due."""
        trainer, step = self.recipe.trainer, self.progress.step
        epoch, into_epoch = divmod(step, self.plans.num_steps)
        last = step == self.total_steps
        due = step % trainer.checkpoint_every_steps == 0 if trainer.checkpoint_every_steps else into_epoch == 0
        if due or last:
            self._save()
        every = trainer.validate_every_epochs
        if every and into_epoch == 0 and epoch % every == 0 and not last:
            self._keep_if_best(self._evaluate(f"epoch {epoch}", rerank=False))

    def _save(self) -> Path:
        self.tracker.flush()  # a killed run goes on from here, and its curves with it
        path = save_checkpoint(self.checkpoints, self.engine, self.queue, self.progress, self.recipe)
        if self.rank.is_main:
            prune(self.checkpoints, self.recipe.trainer.keep_last)
        return path

    def _keep_if_best(self, results: list[Result]) -> None:
        """Points `best` at the present step if its mean first-stage recall at the smallest K is the highest."""
        if not results:
            return
        k = self.recipe.eval.recall_at[0]
        recall = sum(result.recall[k] for result in results) / len(results)
        if recall > best_recall(self.checkpoints):
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
            self.tracker.metrics(
                {f"eval/{benchmark.name}/{k}": v for k, v in result.metrics().items()}, self.progress.step
            )
            if pictures and self.rank.is_main:
                for picture in draw_pictures(pictures / benchmark.name, benchmark, result, self.model, config):
                    self.tracker.artifact(picture, f"pictures/{benchmark.name}")
        return results


def train(recipe: Recipe, rank: Rank, console: Console, *, resume: bool) -> Summary:
    """Trains a recipe on all ranks, from the newest valid checkpoint if `resume`, and evaluates it before and after."""
    training = Training(recipe, rank, console, resume=resume)
    try:
        return training.run()
    except BaseException as error:
        training.tracker.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
