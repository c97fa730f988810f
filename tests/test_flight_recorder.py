"""torch's flight recorder: dumps of real groups are read, and the rank that others wait for is named."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.torchrun import plan
from tests import forked
from tests.ranks import on_ranks, shared_folder
from trainer import flight_recorder
from trainer.flight_recorder import ENTRIES, PREFIX, blame, collected, read, report
from trainer.watchdog import STALLED_STATUS

Entries = list[dict[str, Any]]


def edit(folder: Path, rank: int, change: Callable[[Entries], object]) -> None:
    """Changes the entries of a rank's dump."""
    file = folder / f"{PREFIX}{rank}"
    dumped = pickle.loads(file.read_bytes())  # noqa: S301 - written by this test
    change(dumped["entries"])
    file.write_bytes(pickle.dumps(dumped))


def dumped(folder: Path, rank: int) -> Entries:
    """The entries of a new dump of this rank."""
    flight_recorder.dump(folder, rank)
    return list(pickle.loads((folder / f"{PREFIX}{rank}").read_bytes())["entries"])  # noqa: S301 - written by this test


def last_of_the_world(entries: Entries) -> dict[str, Any]:
    """The last all-reduce of five numbers over all ranks; other checks of these processes made groups of their own."""
    found = (one for one in entries if one["input_sizes"] == [[5]] and one["process_group"][0] == "0")
    return max(found, key=lambda one: one["collective_seq_id"])


def check_dumps_are_read_and_the_rank_that_is_behind_is_named() -> None:
    """torch's own dumps of an all-reduce; then as they would be if the last rank had not begun it, or another one."""
    folder, rank, world = shared_folder(), dist.get_rank(), dist.get_world_size()
    for _ in range(3):
        dist.all_reduce(torch.ones(5))
    dist.barrier()
    # gloo's own thread notes that an operation is done, after it has let this one go.
    assert forked.wait_until(lambda: all(one["retired"] for one in dumped(folder, rank)), 60)
    dist.barrier()
    if rank == 0:
        records = collected(folder)
        assert sorted(records) == list(range(world))
        assert sum(str(call) == "all_reduce [[5]]" for call in records[0].calls["0"].values()) >= 3
        assert records[0].members("0") == tuple(range(world))
        assert report(folder) == ""
        assert not collected(folder, since=(folder / f"{PREFIX}0").stat().st_mtime + 1)
        if world > 1:
            _name_each(folder, world)
        shutil.rmtree(folder)
    dist.barrier()


def _name_each(folder: Path, world: int) -> None:
    last, others = world - 1, list(range(world - 1))
    for one in range(world):
        edit(folder, one, lambda entries: last_of_the_world(entries).update(retired=False))
    calls = read(folder / f"{PREFIX}0").calls["0"]
    number = max(number for number, call in calls.items() if str(call).endswith("[[5]]"))
    guilty, line = blame(collected(folder))
    assert guilty == (), line
    assert f"all ranks have begun all_reduce [[5]] of group default_pg, number {number}" in line, line
    waiting = f"rank{'s' if world > 2 else ''} {', '.join(map(str, others))} wait"
    whole = (folder / f"{PREFIX}{last}").read_bytes()
    edit(folder, last, lambda entries: last_of_the_world(entries).update(input_sizes=[[7]]))
    guilty, line = blame(collected(folder))
    assert guilty == (last,)
    assert line.startswith(f"rank {last} began all_reduce [[7]] of group default_pg, number {number}, where rank")
    (folder / f"{PREFIX}{last}").write_bytes(whole)
    edit(folder, last, lambda entries: entries.__setitem__(slice(None), _before(entries, number)))
    guilty, line = blame(collected(folder))
    assert guilty == (last,)
    assert line.startswith(f"rank {last} has not begun all_reduce [[5]] of group default_pg, number {number}")
    assert f"in which {waiting}" in line
    (folder / f"{PREFIX}{last}").unlink()
    guilty, line = blame(collected(folder))
    assert guilty == (last,)
    assert line.startswith(f"rank {last} left no record; {waiting}")


def _before(entries: Entries, number: int) -> Entries:
    return [one for one in entries if one["process_group"][0] != "0" or one["collective_seq_id"] < number]


test_on_ranks = on_ranks(__file__)


@pytest.mark.slow
def test_a_standstill_leaves_records_that_name_the_rank(tmp_path: Path) -> None:
    """Both ranks are in the same section, so that positions alone do not tell who waits for whom."""
    arguments = (str(tmp_path), "2", "2")
    ranks = [forked.Command(tmp_path, "tests.stand_still", str(rank), *arguments, apart=True) for rank in (0, 1)]
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [STALLED_STATUS] * 2, told
    errors = "".join(error for _, error in told)
    assert "flight recorder: rank 1 has not begun all_reduce [[1]] of group default_pg" in errors, errors
    assert {file.name for file in tmp_path.glob(f"{PREFIX}*")} == {f"{PREFIX}0", f"{PREFIX}1"}


def test_what_is_no_dump_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    contents = {
        0: pickle.dumps(Hostile()),
        1: b"",
        2: b"\x80\x02nonsense",
        3: pickle.dumps({"version": "3.0", "entries": [], "pg_config": {}}),
        4: pickle.dumps({"version": "2.10", "entries": [{}], "pg_config": {}}),
        5: pickle.dumps([]),
    }
    for rank, content in contents.items():
        file = tmp_path / f"{PREFIX}{rank}"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{PREFIX}{rank}: no dump of torch's flight recorder"):
            read(file)
    (tmp_path / f"{PREFIX}6.part").write_bytes(b"")
    assert collected(tmp_path) == {}
    assert not (tmp_path / "made").exists()
    assert blame({}) == ((), "")


def test_a_launch_and_a_training_switch_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, now, file = "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"

    def of_a_launch() -> dict[str, str]:
        return plan(["--nproc-per-node", "2"], ["train", "demo"]).environment

    for name in (before, now, file):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    assert of_a_launch()[now] == ENTRIES
    monkeypatch.setenv(before, "7")  # the user's own, by the name that torch had for it
    assert now not in of_a_launch()
    monkeypatch.delenv(before)
    monkeypatch.setenv(now, "8")
    assert of_a_launch()[now] == "8"
    flight_recorder.switch_on(tmp_path)
    assert (os.environ[now], os.environ[file]) == ("8", str(tmp_path / PREFIX))
