"""Batches copied one ahead on a stream of their own: the host's pixels, for which the device waits and not the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import DataConfig
from data_pipeline.copies import CopyStream
from data_pipeline.index import read_index
from data_pipeline.loader import PlaceBatch, PlaceLoader
from data_pipeline.plan import Batching, EpochPlan, plan_epoch
from model.network import build_model
from tests.pretend_device import HERE, Elsewhere, pretend_device
from tests.pretend_step import batch_of, pretend_training_device, recipe_of, steps_elsewhere
from tests.pretend_streams import pretend_streams

P, K = 2, 3


class AtOnce:
    """A pool of threads that has always done its work."""

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args))
        except ValueError as error:
            future.set_exception(error)
        return future


class NotYet(Future[Any]):
    """Work that is done when somebody waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self.work = work

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.set_result(self.work())
        return super().result(timeout)


class WhenAsked:
    """A pool of threads that is always late."""

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        return NotYet(lambda: work(*args))


@pytest.fixture(scope="module")
def plan(shard_set: Path) -> EpochPlan:
    index = read_index(shard_set)
    return plan_epoch(index.place_city, index.num_views, Batching(P, K, "mixed"), seed=0, epoch=0)


def loader_of(shard_set: Path, copies: CopyStream | None = None, *, pool: Any = None, threads: int = 1) -> PlaceLoader:
    config = DataConfig(image_size=28, places_per_batch=P, images_per_place=K, decode_threads=threads)
    loader = PlaceLoader(read_index(shard_set), config, rank=0, world_size=1, copies=copies)
    if pool:
        loader._pools = (pool, pool)
    return loader


def pixels(loader: PlaceLoader, plan: EpochPlan) -> list[torch.Tensor]:
    return [batch.images_B3HW for batch in loader.batches(plan, range(plan.num_steps))]


@pytest.mark.parametrize(
    ("pool", "threads", "ahead"), [(AtOnce(), 1, 1), (WhenAsked(), 1, 0), (None, 3, None), (None, 0, 0)]
)
def test_pixels_are_those_of_the_host_and_the_host_never_waits(
    shard_set: Path, plan: EpochPlan, pool: Any, threads: int, ahead: int | None
) -> None:
    """However late the decoders are: a batch that is decoded in time is on its way before the one before it is used."""
    expected = pixels(loader_of(shard_set), plan)
    with pretend_device() as device, pretend_streams(device) as streams:
        loader = loader_of(shard_set, CopyStream(HERE), pool=pool, threads=threads)
        found = []
        for number, batch in enumerate(loader.batches(plan, range(plan.num_steps))):
            assert isinstance(batch.images_B3HW, Elsewhere)
            assert streams.uses(batch.images_B3HW, streams.default)
            if ahead is not None:
                assert streams.begun == min(number + 1 + ahead, plan.num_steps)
            found.append(batch.images_B3HW.clone())
        assert not device.waits, device.table()
        assert streams.begun == len(expected) == plan.num_steps > 2
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def test_who_does_not_wait_for_a_copy_computes_with_other_numbers(
    shard_set: Path, plan: EpochPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that the test above would catch."""
    expected = pixels(loader_of(shard_set), plan)
    monkeypatch.setattr(CopyStream, "hand_over", lambda _, there: there)
    with pretend_device() as device, pretend_streams(device):
        found = [one.clone() for one in pixels(loader_of(shard_set, CopyStream(HERE), pool=AtOnce()), plan)]
        assert not any(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def test_a_batch_that_cannot_be_decoded_raises_in_its_turn(
    shard_set: Path, plan: EpochPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("as decoding does")

    with pretend_device() as device, pretend_streams(device) as streams:
        loader = loader_of(shard_set, CopyStream(HERE), pool=AtOnce())
        decode_place = loader._decode_place
        broken = int(plan.places_SP[1, 0])
        monkeypatch.setattr(
            loader,
            "_decode_place",
            lambda step, number, *rest: (fails if step.places[number] == broken else decode_place)(step, number, *rest),
        )
        batches = loader.batches(plan, range(plan.num_steps))
        next(batches)
        assert streams.begun == 1
        with pytest.raises(ValueError, match="as decoding does"):
            next(batches)


@pytest.mark.slow
def test_a_step_computes_the_same_and_waits_no_more(single_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training's step takes batches from either side."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)

    def run(copies: Callable[[], CopyStream] | None) -> tuple[list[float], Counter[str]]:
        recipe = recipe_of()
        model = build_model(recipe.model)
        with pretend_training_device() as device, pretend_streams(device):
            steps, stream = steps_elsewhere(recipe, model), copies() if copies else None
            losses = []
            for number in range(3):
                batch: PlaceBatch = batch_of(recipe, number, pin=True)
                if stream:
                    batch = replace(batch, images_B3HW=stream.hand_over(stream.begin(batch.images_B3HW)))
                device.forget()
                losses.append(steps.step(batch, 1e-3).loss)
                steps.state.progress.step += 1
            return losses, device.by_code()

    assert run(lambda: CopyStream(HERE)) == run(None)
