"""Losses that pytorch-metric-learning computes: a plug-in's, as docs/extending.md has it, and ours with its miners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.plugins import load_plugins
from configs.schema import LossConfig, MemoryConfig
from memory.global_loss import GlobalLoss
from memory.queue import MemoryQueue
from memory.strategies import ByLibrary
from tests.test_extending import FILES
from tests.test_plugin_records import forget


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    forget()


def test_a_plugins_loss_and_miner_are_computed_as_they_are_written(
    single_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: each anchor's own pairs, an image with itself apart; with a miner that is ours or the library's too."""
    monkeypatch.chdir(tmp_path)
    Path("library.py").write_text(FILES["library.py"])
    load_plugins(["library.py"])
    rows = F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    ids = torch.tensor([0, 0, 1, 1])
    apart, same = torch.cdist(rows, rows), ids[:, None] == ids
    for miner, kept in (("NearMiner", apart < 1), ("none", apart >= 0)):
        loss = GlobalLoss(LossConfig(name="SoftMarginLoss", args={"margin": 0.7}, miner=miner), MemoryConfig(size=0))
        assert "computed by pytorch-metric-learning" in loss.note
        found = loss(rows, ids, MemoryQueue(0, 6), step=0).loss
        pull = (F.softplus(apart) * (same & ~torch.eye(4).bool())).sum(1)
        push = (F.softplus(0.7 - apart) * (~same & kept)).sum(1)
        torch.testing.assert_close(found, (pull + push).mean())


def test_one_loss_has_one_default_whoever_computes_it(single_process: None) -> None:
    """The library's own alpha and base of MultiSimilarityLoss are others."""
    loss = GlobalLoss(LossConfig(miner="PairMarginMiner"), MemoryConfig(size=0)).strategy
    assert isinstance(loss, ByLibrary)
    assert [getattr(loss.library.loss, name) for name in ("alpha", "beta", "base")] == [1.0, 50.0, 0.0]
