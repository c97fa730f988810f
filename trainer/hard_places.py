"""Hard places: steps whose places are alike by descriptors of the network as it is, found again for each window.

All ranks encode one view of each candidate; rank 0 composes the batches and tells the others. Descriptors of the same
weights differ in their last bits between machines and numbers of threads, and so may what is composed of them: it is
composed once, kept in `state.composed` and in every checkpoint, and a resumed training replays it at any world size.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.ranks import from_rank_0
from data_pipeline import hard_plan
from data_pipeline.images import normalise
from data_pipeline.place_positions import place_points
from data_pipeline.plan import EpochPlan, Int64
from data_pipeline.utm import Floats
from trainer.batches import Batches
from trainer.cliques import Alike, Wanted, alike_batches
from trainer.context import Context
from trainer.hard_cost import LEAST_CHUNKS, NUMBERS
from trainer.manifest import CheckpointError
from trainer.state import TrainingState

_PROJECTION, _CLIQUES = 2**21 + 3, 2**21 + 4  # streams of draws, beside those of data_pipeline/hard_plan.py


class HardPlaces:
    """The plan of each window of an epoch, composed when its first step is due; every rank calls it together."""

    def __init__(self, context: Context, state: TrainingState, batches: Batches) -> None:
        self.data, self.seed = context.recipe.data, context.recipe.seed
        self.chunk = context.recipe.eval.batch_size
        self.state, self.batches, self.plans = state, batches, batches.plans
        self.watchdog, self.say = context.watchdog, context.say
        self._points_N3: Floats | None = None  # on rank 0
        self._figures: dict[str, float] = {}  # not logged yet
        self._told = False

    def __call__(self, epoch: int, step: int) -> tuple[EpochPlan, int]:
        """The epoch's plan as far as it is composed, and where that ends: after `step`, a step of the epoch.

        Without hard steps that is the whole epoch. Raises CheckpointError if what came before in the epoch is unknown.
        """
        data, num_steps = self.data, self.plans.num_steps
        if not data.hard_share:
            return self.plans.epoch(epoch), num_steps
        composed = self.state.composed
        if composed is None or composed.epoch != epoch:
            composed = hard_plan.nothing_composed(epoch, data.places_per_batch)
        if step >= composed.num_steps:
            start, stop = hard_plan.window_of(step, data.hard_every_steps, num_steps)
            if not start == step == composed.num_steps:
                raise CheckpointError(
                    f"the batches of step {step} of epoch {epoch} are not in the checkpoint; resume from another one"
                )
            composed = self._extended(composed, stop)
        self.state.composed = composed
        return hard_plan.with_views(data, self.batches.places.num_views, composed, seed=self.seed), composed.num_steps

    def figures(self) -> dict[str, float]:
        """Metrics of what was composed since they were last asked for."""
        figures, self._figures = self._figures, {}
        return figures

    def _extended(self, composed: hard_plan.Composed, stop: int) -> hard_plan.Composed:
        """`composed` with the window up to `stop`."""
        data, epoch, start = self.data, composed.epoch, composed.num_steps
        visits, began = self.plans.visits(epoch), time.perf_counter()
        num_views = self.batches.places.num_views
        places_N, views_N = hard_plan.candidates(data, num_views, visits, composed, stop, seed=self.seed)
        self.watchdog.enter("compose", epoch * self.plans.num_steps + start)
        descriptors_ND = self.encoded(places_N, views_N)
        encoded = time.perf_counter()
        wanted = hard_plan.num_hard(data.hard_share, start, stop) if len(places_N) else 0
        alike = from_rank_0(lambda: self._alike(descriptors_ND, places_N, wanted, epoch, start))
        done = hard_plan.extended(
            visits, composed, stop, places_N[alike.batches_HP], self.plans.of_visits, seed=self.seed
        )
        self._note(alike, wanted, len(places_N), encoded - began, time.perf_counter() - encoded)
        return done

    @torch.no_grad()
    def encoded(self, places_N: Int64, views_N: Int64) -> NDArray[np.float16]:
        """L2-normalised descriptors [N, D] of one view of each place on rank 0, empty on the others.

        A chunk of places is encoded whole by one rank, whatever their number: so a chunk's numbers are the same at any
        world size. D is at most NUMBERS.
        """
        engine, world, rank = self.state.engine, dist.get_world_size(), dist.get_rank()
        size = min(self.state.model.descriptor_size, NUMBERS)
        found_ND = np.empty((len(places_N) if rank == 0 else 0, size), dtype=np.float16)
        if not len(places_N):
            return found_ND
        chunks = _Chunks.of(places_N, views_N, min(self.chunk, math.ceil(len(places_N) / LEAST_CHUNKS)))
        projection_DK = self._projection()
        was_training = engine.training
        engine.eval()
        rounds = range(0, chunks.num_steps, world)
        # In the last round a rank that has no chunk encodes the last one again: the network may need all ranks.
        numbers = [min(first + rank, chunks.num_steps - 1) for first in rounds]
        for first, batch in zip(rounds, self.batches.of_plan(chunks, numbers), strict=True):
            descriptors_CD = engine(normalise(batch.images_B3HW.to(engine.device, non_blocking=True)))
            kept_CK = descriptors_CD.float() if projection_DK is None else descriptors_CD.float() @ projection_DK
            kept_CK = torch.nn.functional.normalize(kept_CK).half()
            parts = [torch.empty_like(kept_CK) for _ in range(world)] if rank == 0 else None
            dist.gather(kept_CK, parts)
            for number, part_CK in enumerate(parts or []):
                start = (first + number) * chunks.size
                rows = found_ND[start : start + chunks.size]
                rows[:] = part_CK[: len(rows)].cpu().numpy()
            self.watchdog.alive()
        engine.train(was_training)
        return found_ND

    def _projection(self) -> torch.Tensor | None:
        """Random signs [D, NUMBERS] that keep cosines within 1 / sqrt(NUMBERS) or so (Achlioptas, 2003)."""
        size = self.state.model.descriptor_size
        if size <= NUMBERS:
            return None
        bits = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(_PROJECTION,)))
        signs = np.unpackbits(bits.random_raw(size * NUMBERS // 64).astype("<u8").view(np.uint8))
        signs_DK = torch.from_numpy(signs.reshape(size, NUMBERS)).to(self.state.engine.device)
        return signs_DK.float() * 2 - 1

    def _alike(
        self, descriptors_ND: NDArray[np.float16], places_N: Int64, wanted: int, epoch: int, start: int
    ) -> Alike:
        data = self.data
        if not np.isfinite(descriptors_ND).all():
            broken = int(places_N[np.flatnonzero(~np.isfinite(descriptors_ND).all(axis=1))[0]])
            raise ValueError(f"place {broken}: its descriptor is not finite; the training has diverged: lower optim.lr")
        if data.hard_min_m and self._points_N3 is None:
            self._points_N3 = place_points(self.batches.places.sets)
        points_N3 = None if self._points_N3 is None else self._points_N3[places_N]
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch], spawn_key=(_CLIQUES, start)))
        asked = Wanted(wanted, data.places_per_batch, data.hard_cliques, data.hard_min_m, points_N3)
        return alike_batches(descriptors_ND, asked, bits, lambda *_, **__: self.watchdog.alive())

    def _note(self, alike: Alike, wanted: int, num_places: int, encode_s: float, compose_s: float) -> None:
        """Keeps the figures until they are logged; says so if fewer steps are hard than asked."""
        made, sums = len(alike.batches_HP), ("hard_encode_s", "hard_compose_s", "hard_steps", "hard_steps_missed")
        for name, value in zip(sums, (encode_s, compose_s, made, wanted - made), strict=True):
            self._figures[f"train/{name}"] = self._figures.get(f"train/{name}", 0.0) + value
        if made:
            self._figures["train/hard_similarity"] = alike.similarity
            self._figures["train/hard_pool_similarity"] = alike.pool_similarity
        if made and not self._told:
            self._told = True
            self.say(
                f"hard places: {made} of {wanted} hard steps made of {num_places} places, encoded in {encode_s:.1f} s, "
                f"composed in {compose_s:.1f} s; cosine of two places {alike.similarity:.3f} in a clique, "
                f"{alike.pool_similarity:.3f} of any"
            )
        if made < wanted:
            apart = f" at least {self.data.hard_min_m:g} m apart" if self.data.hard_min_m else ""
            self.say(
                f"[yellow]hard places: {made} of {wanted} hard steps could be made of {num_places} places{apart}; the "
                "others are composed as without data.hard_share"
            )


class _Chunks(EpochPlan):
    """Places in chunks of C that one rank takes whole, one view of each; the last is filled with its last place."""

    @classmethod
    def of(cls, places_N: Int64, views_N: Int64, size: int) -> _Chunks:
        number = math.ceil(len(places_N) / size)
        rows = np.minimum(np.arange(number * size), len(places_N) - 1).reshape(number, size)
        return cls(places_N[rows], views_N[rows][..., None].__getitem__)

    @property
    def size(self) -> int:
        """C, places of a chunk."""
        return self.places_SP.shape[1]

    def rank_part(self, rank: int, world_size: int) -> slice:  # noqa: ARG002
        """The whole chunk, on any rank."""
        return slice(None)
