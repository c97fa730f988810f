"""Cliques: batches of places whose descriptors are alike, at least some metres apart."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import cliques, hard_cost
from trainer.cliques import Wanted, alike_batches


def bits(seed: int = 0) -> np.random.Philox:
    return np.random.Philox(seed)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def clusters(number: int, each: int, seed: int = 0, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors around centres, in a random order, and the centre of each."""
    rng = np.random.default_rng(seed)
    of = rng.permutation(np.repeat(np.arange(number), each))
    centres = rng.standard_normal((number, 32))
    return unit(centres[of] + noise * rng.standard_normal((len(of), 32))), of


@pytest.mark.parametrize("cell_rows", [cliques.CELL_ROWS, 40])
def test_a_batch_is_of_one_cluster(cell_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cliques, "CELL_ROWS", cell_rows)
    rows, of = clusters(12, 8)
    alike = alike_batches(rows, Wanted(batches=9, places_per_batch=8), bits())
    assert len(np.unique(alike.batches_HP)) == alike.batches_HP.size
    whole = [len(set(batch)) == 1 for batch in of[alike.batches_HP]]
    if cell_rows > len(rows):
        assert all(whole)
        assert len(whole) == 9
        assert alike.similarity > 0.9 > 0.2 > alike.pool_similarity
    else:  # k-means cuts a few clusters
        assert sum(whole) >= 5


def test_cliques_are_the_greedy_ones_of_a_dense_reference() -> None:
    """Each batch is grown again by the definition from all rows that were free, over the whole matrix of cosines."""
    rows = unit(np.random.default_rng(3).standard_normal((60, 16)))
    floats = rows.astype(np.float32)
    cosines = floats @ floats.T
    alike = alike_batches(rows, Wanted(batches=10, places_per_batch=6), bits(5))
    free = np.ones(60, dtype=bool)
    sums = []
    for batch in alike.batches_HP:
        clique = [int(batch[0])]
        while len(clique) < 6:
            others = [row for row in np.flatnonzero(free) if row not in clique]
            clique.append(max(others, key=lambda row: cosines[row, clique].sum()))
        assert batch.tolist() == clique
        free[clique] = False
        sums.append(np.triu(cosines[np.ix_(clique, clique)], 1).sum() / 15)
    assert alike.similarity == pytest.approx(np.mean(sums), rel=1e-5)
    off_diagonal = (cosines.sum() - 60) / (60 * 59)
    assert alike.pool_similarity == pytest.approx(off_diagonal, abs=1e-4)  # float16 rows are not of length 1 exactly


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(4, 9), st.sampled_from([0.0, 1.5, 4.0]), st.integers(0, 5))
def test_batches_keep_their_distance(groups: int, batch: int, min_m: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, _ = clusters(5, 12, seed)
    points = np.stack([rng.uniform(0, 12, 60), rng.uniform(0, 12, 60), np.zeros(60)], axis=1)
    groups = min(groups, batch // 2)
    wanted = Wanted(60 // batch, batch, groups, min_m, points)
    alike = alike_batches(rows, wanted, bits(seed))
    assert len(np.unique(alike.batches_HP)) == alike.batches_HP.size
    for of in alike.batches_HP:
        apart = np.linalg.norm(points[of][:, None] - points[of][None], axis=-1)[np.triu_indices(batch, 1)]
        assert apart.min() >= min_m
    if not min_m:
        assert len(alike.batches_HP) == 60 // batch
    again = alike_batches(rows, wanted, bits(seed))
    assert np.array_equal(alike.batches_HP, again.batches_HP)


def test_places_at_one_spot_make_no_batch() -> None:
    rows, _ = clusters(20, 20)
    alike = alike_batches(rows, Wanted(10, 8, 1, 5.0, np.zeros((400, 3))), bits())
    assert alike.batches_HP.shape == (0, 8)
    assert np.isnan(alike.similarity)


def test_near_duplicates_are_passed_over_for_places_farther_off() -> None:
    """The 300 rows most like a seed lie at its spot: the search has to go past them."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(16)
    rows = unit(np.concatenate([base + 0.01 * rng.standard_normal((300, 16)), base + rng.standard_normal((40, 16))]))
    points = np.concatenate([np.zeros((300, 3)), 100.0 * np.arange(1, 41)[:, None] * np.ones(3)])
    alike = alike_batches(rows, Wanted(4, 8, 1, 25.0, points), bits())
    assert len(alike.batches_HP) == 4
    assert ((alike.batches_HP < 300).sum(axis=1) <= 1).all()


def test_composing_takes_the_memory_that_is_planned() -> None:
    """The peak of NumPy's and Python's own memory, against the plan's bytes less the descriptors, which come in."""
    rows = unit(np.random.default_rng(0).standard_normal((20_000, 256), dtype=np.float32))
    tracemalloc.start()
    alike_batches(rows, Wanted(batches=150, places_per_batch=64), bits())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    planned = hard_cost.composing_bytes(len(rows), 256) - rows.nbytes
    assert 0.5 * planned < peak < 1.1 * planned
