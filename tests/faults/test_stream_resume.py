"""A training on whole tars, by command: killed within an epoch, resumed on as many ranks and on others."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests import forked
from tests.photos import write_gsv_cities
from tests.training import finish, kill_all, last_checkpoint, logged, make_workplace, same_state

EPOCH, EPOCHS = 11, 2  # steps of 4 places of 45
KILLED_FROM = 5


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    make_workplace(folder)
    write_gsv_cities(folder / "more", {"Aachen": dict.fromkeys(range(25), 4), "Bergen": dict.fromkeys(range(20), 5)})
    write_shards(read_gsv_cities(folder / "more"), folder / "tars", ShardOptions(shard_bytes=20_000))
    assert len(list((folder / "tars" / "shards").glob("*.tar"))) > 8
    return folder


def on_ranks(workplace: Path, ranks: int, output: str, *flags: str) -> forked.Command:
    """A training as a user starts it."""
    streams = "--data.access stream --data.composition mixed --data.stream-buffer-places 16 --data.shards tars"
    engine = "--engine.encode-chunks 1 --memory.decay exponential --memory.drift-every 0 --memory.start-epoch 0"
    rest = f"--trainer.epochs {EPOCHS} --trainer.validate-every-epochs 0 --tracking.enabled False --eval.benchmarks"
    words = ["train", "recipe.yaml", "--output", output, *streams.split(), *engine.split(), *flags, *rest.split()]
    return forked.Command(workplace, "rerankvpr", "launch", "--nproc-per-node", str(ranks), "--", *words)


def losses(folder: Path) -> list[float]:
    found = logged(folder)
    assert sorted(found) == list(range(1, EPOCH * EPOCHS + 1))
    return [found[step]["train/loss"] for step in sorted(found)]


def test_killed_within_an_epoch_and_resumed_on_any_ranks_the_losses_are_the_same(workplace: Path) -> None:
    """Bitwise on as many ranks; on others the tolerance of float32 sums in another order, which Adam amplifies."""
    finish(on_ranks(workplace, 2, "straight"))
    process = on_ranks(workplace, 2, "killed")
    lines, deadline = workplace / "killed" / "metrics.jsonl", time.monotonic() + 240
    while not lines.exists() or len(logged(lines.parent)) < KILLED_FROM:
        assert process.poll() is None, process.output()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(process)
    step = int(last_checkpoint(workplace / "killed").name.removeprefix("step-"))
    assert 0 < step < EPOCH * EPOCHS
    assert step % EPOCH, "killed between two epochs"

    expected = losses(workplace / "straight")
    assert len(set(expected)) == len(expected)
    for ranks in (2, 4, 1):
        output = workplace / f"resumed-on-{ranks}"
        shutil.copytree(workplace / "killed", output)
        printed = finish(on_ranks(workplace, ranks, output.name, "--resume"))
        assert "resumed from" in printed
        assert "tars that had been given are read again, at most" in printed
        if ranks == 2:
            assert losses(output) == expected
            same_state(last_checkpoint(output), last_checkpoint(workplace / "straight"))
        else:
            assert losses(output) == pytest.approx(expected, rel=2e-3), f"{ranks} ranks"
