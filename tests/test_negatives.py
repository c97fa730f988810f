"""The hardest negatives of the queue: by brute force, over ranks, in a table, as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from configs.schema import LossConfig, MemoryConfig, Recipe
from data_pipeline.loader import PlaceBatch
from eval.report.negatives import draw_negatives, hardest_pairs, read_negatives
from memory.decay import log_weight
from memory.global_loss import GlobalLoss
from memory.hardest import hardest_negatives
from memory.near_places import NearPlaces
from memory.place_sets import PlaceSets
from memory.queue import MemoryQueue
from memory.set_queues import SetQueues
from tests.ranks import on_ranks
from trainer.negatives import COLUMNS, NAME, ROWS, NegativesTable, QueueNegatives, is_due

PLACES, VIEWS, DIM, STEPS = 8, 3, 16, 5
BATCH = PLACES * VIEWS


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Descriptors and places of a global batch: neighbours of neighbouring steps share places."""
    generator = torch.Generator().manual_seed(step)
    rows_ND = F.normalize(torch.randn(BATCH, DIM, generator=generator), dim=1)
    return rows_ND, (step * PLACES // 2 + torch.arange(PLACES)).repeat_interleave(VIEWS)


def filled(queue: Any) -> None:
    for step in range(STEPS):
        rows_ND, ids_N = batch_of(step)
        queue.enqueue(rows_ND, ids_N, step, host_ids_N=ids_N)


def by_force(size: int, near: NearPlaces | None, sets: PlaceSets | None) -> list[tuple[int, int, int, float]]:
    """Place, negative place, step that stored it and cosine of the hardest negative of each place, hardest first."""
    stored = [(s, int(p), row) for s in range(STEPS) for row, p in zip(*batch_of(s), strict=True)]
    found = {}
    for row, place in zip(*batch_of(STEPS), strict=True):
        for number in range(len(sets) if sets else 1):
            of_set = [one for one in stored if not sets or int(one[1] >= 16) == number]
            share = size if not sets else size // 2
            for step, negative, other in of_set[-share:]:
                if negative == int(place) or (sets and int(place >= 16) != number):
                    continue
                if near and (near.steps_n3[negative] - near.steps_n3[place]).double().norm() / 8 < 100:
                    continue
                cosine = float(row @ other)
                if cosine > found.get(int(place), (0, 0, -2.0))[2]:
                    found[int(place)] = negative, step, cosine
    return sorted(((place, *rest) for place, rest in found.items()), key=lambda one: -one[3])


def check_they_are_those_of_brute_force_on_any_ranks() -> None:
    """Cosines within 1e-6: products of other shapes add up in another order."""
    points = 60 * torch.arange(PLACES * STEPS)[:, None] * torch.tensor([[1.0, 0, 0]])
    rows_ND, ids_N = batch_of(STEPS)
    for placement, spared, tile_mb, divided in (
        ("replicated", False, 256, False),
        ("sharded", False, 256, False),
        ("sharded", True, 256, False),
        ("replicated", True, 0, False),
        ("sharded", False, 256, True),
    ):
        size = 5 * BATCH // 2 if not divided else 4 * BATCH
        sets = PlaceSets(["a", "b"], [0, 16, 40], [1, 1]) if divided else None
        sizes = [size // 2, size // 2] if divided else [size]
        queues = [MemoryQueue(one, DIM, placement=placement) for one in sizes]  # type: ignore[arg-type]
        queue = SetQueues(queues, sets) if sets else queues[0]
        filled(queue)
        near = NearPlaces(points, 100) if spared else None
        config = MemoryConfig(size=size, decay_lambda=0.2).model_copy(update={"tile_mb": tile_mb})  # 0: a row at a time
        nothing_a2 = torch.zeros(0, 2)
        found = hardest_negatives(
            queue, rows_ND, ids_N, step=STEPS, most=5, config=config, curve_a2=nothing_a2, near=near
        )
        expected = by_force(size, near, sets)[:5]
        ours = list(zip(found.place_n, found.negative_n, found.stored_n, strict=True))
        assert ours == [one[:3] for one in expected], (placement, spared, divided, dist.get_rank())
        np.testing.assert_allclose(found.cosine_n, [one[3] for one in expected], atol=1e-6)
        weights = log_weight(torch.from_numpy(STEPS - found.stored_n).double(), config, nothing_a2).exp()
        np.testing.assert_allclose(found.weight_n, weights)
        for n in range(len(found)):
            assert ids_N[found.row_n[n]] == found.place_n[n]
            there = (rows_ND[found.row_n[n]] @ batch_of(int(found.stored_n[n]))[0].T).numpy()
            of_place = np.flatnonzero(batch_of(int(found.stored_n[n]))[1].numpy() == found.negative_n[n])
            row = of_place[-1 - int(found.newer_n[n])]  # which of the place's images it is
            assert there[row] == pytest.approx(found.cosine_n[n], abs=1e-6)


test_on_ranks = on_ranks(__file__)


def test_an_empty_queue_and_one_of_the_same_places_have_none(single_process: None) -> None:
    rows_ND, ids_N = batch_of(0)
    queue, config = MemoryQueue(BATCH, DIM), MemoryConfig(size=BATCH)
    for _ in range(2):
        found = hardest_negatives(
            queue, rows_ND[:3], ids_N[:3], step=1, most=5, config=config, curve_a2=torch.zeros(0, 2)
        )
        assert len(found) == 0
        queue.enqueue(rows_ND[:3], ids_N[:3], 0, host_ids_N=ids_N[:3])


def test_tables_grow_with_the_logarithm_of_the_steps() -> None:
    steps = [step for step in range(1, 40_001) if is_due(step, 10)]
    assert steps[:3] == [10, 20, 30]
    assert len(steps) == 2000
    assert [b - a for a, b in itertools.pairwise(steps)] == [10] * 999 + [20] * 500 + [40] * 500


def recipe_for(folder: Path, every: int) -> Recipe:
    return Recipe.model_validate(
        {
            "output": folder,
            "data": {"shards": "none", "places_per_batch": PLACES, "images_per_place": VIEWS},
            "memory": {"size": 3 * BATCH, "decay_lambda": 0.1},
            "trainer": {"log_negatives_every": every},
        }
    )


def test_the_table_names_views_and_ages_and_a_repeated_step_counts_once(single_process: None, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, every=2)
    queue = MemoryQueue(recipe.memory.size, DIM)
    state: Any = SimpleNamespace(queue=queue, drift=None, progress=SimpleNamespace(step=0))
    negatives = QueueNegatives(recipe, GlobalLoss(LossConfig(), recipe.memory), state)
    artifacts: list[Path] = []
    context: Any = SimpleNamespace(
        recipe=recipe, say=print, rank=SimpleNamespace(is_main=True), tracker=SimpleNamespace(artifact=artifacts.append)
    )
    table = NegativesTable(context)
    for step in range(STEPS):
        rows_ND, ids_N = batch_of(step)
        views_N = torch.arange(VIEWS).repeat(PLACES) + 10 * step
        batch = PlaceBatch(torch.zeros(0), ids_N, views_N, ids_N, views_N=views_N)
        out: Any = SimpleNamespace(descriptors_ND=rows_ND, host_ids_N=ids_N)
        state.progress.step = step
        lines = negatives.found(out, batch, step)
        assert bool(lines) == ((step + 1) % 2 == 0)
        table.append(lines)
        negatives.stored(batch, step)
        queue.enqueue(rows_ND, ids_N, step, host_ids_N=ids_N)
        if step == 3:
            table.append(lines)  # a step that a resumed training did again
    table.send()
    table.send()
    assert artifacts == [tmp_path / NAME]
    text = (tmp_path / NAME).read_text()
    assert text.splitlines()[0] == ",".join(COLUMNS)
    (tmp_path / NAME).write_text(text + "6,1,3")  # cut off
    read = read_negatives(tmp_path / NAME)
    assert read.steps.tolist() == [2, 4]
    assert len(read.cosine_n) == 2 * PLACES <= 2 * ROWS
    for row in range(len(read.cosine_n)):
        one = {name: int(values[row]) for name, values in read.whole_n.items()}
        step = one["step"] - 1
        assert one["view"] // 10 == step
        assert one["negative_view"] // 10 == step - one["age"]
        anchor, negative = (
            batch_of(s)[0][(batch_of(s)[1] == place).nonzero()[view % 10, 0]]
            for s, place, view in (
                (step, one["place"], one["view"]),
                (step - one["age"], one["negative_place"], one["negative_view"]),
            )
        )
        assert float(anchor @ negative) == pytest.approx(read.cosine_n[row], abs=2e-6)
        assert read.weight_n[row] == pytest.approx(np.exp(-0.1 * one["age"]), rel=1e-5)
    (late,) = hardest_pairs(read, 1)
    assert read.whole_n["step"][late] == 4

    drawn = draw_negatives(
        tmp_path / "shown.png",
        read,
        lambda place, view: np.full((30, 40, 3), 40 * (place + view) % 255, np.uint8) if place != 8 else None,
        most=4,
        title="a run",
    )
    assert 1 <= drawn <= 4
    assert np.asarray(Image.open(tmp_path / "shown.png").convert("L")).std() > 10


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    for text in ("", ",".join(COLUMNS), "step,order\n1,1\n", ",".join(COLUMNS) + f"\n1,1,0,0,1,0,{10**30},0.5,1\n"):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(ValueError, match=f"{NAME}: holds no negatives"):
            read_negatives(tmp_path / NAME)
