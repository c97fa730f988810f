"""Checkpoints under crashes and on full disks; folders of checkpoints that are pruned, damaged and chosen from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests import forked
from tests.ranks import on_ranks, shared_folder
from trainer import checkpoint_writer
from trainer.checkpoint import Contents, checkpoint_weights
from trainer.checkpoint_folder import (
    best_recall,
    find_checkpoint,
    newest_valid,
    point,
    prune,
    set_aside_newer,
    step_name,
)
from trainer.checkpoint_writer import CheckpointWriter
from trainer.manifest import FORMAT, NEEDED, PARTED, CheckpointError, faults


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / step_name(step)
    path.mkdir(parents=True)
    files = {f"{kind}-00000-of-00001.safetensors": b"m" * 100 for kind in PARTED}
    files |= {"optimizer.json": b"e" * 50, "state.json": b"{}", "recipe.yaml": b"{}"}
    for name, content in files.items():
        (path / name).write_bytes(content)
    digests = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    (path / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": step, "world_size": 1, "files": digests}))
    return path


def cut(path: Path) -> None:
    file = path / "optimizer.json"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "model-00000-of-00001.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])


def lose(path: Path) -> None:
    (path / "optimizer.json").unlink()


def unfinished(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, "has 49 bytes, expected 50"), (flip, "differs from"), (lose, "is missing"), (unfinished, "was cut off")],
)
def test_resume_takes_the_newest_checkpoint_that_verifies(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    older, newer = make_checkpoint(tmp_path, 90), make_checkpoint(tmp_path, 100)
    assert newest_valid(tmp_path) == (newer, [])
    damage(newer)
    point(tmp_path / "best", newer, 50.0)
    found, notes = newest_valid(tmp_path)
    assert found == older
    assert words in notes[0]
    assert newer.name in notes[0]
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(newer)
    set_aside_newer(tmp_path, found)
    assert newest_valid(tmp_path) == (older, [])
    assert (tmp_path / f"unused-{newer.name}").is_dir()
    assert find_checkpoint(tmp_path) == older  # neither latest nor best name the damaged one
    prune(tmp_path, keep_last=1)
    assert older.is_dir()


def test_a_run_means_its_best_checkpoint_else_its_newest(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    first, second = make_checkpoint(folder, 5), make_checkpoint(folder, 10)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path / "run")
    point(folder / "latest", second)
    assert find_checkpoint(tmp_path / "run") == second
    assert best_recall(folder) == -1
    point(folder / "best", first, 61.5)
    assert best_recall(folder) == 61.5
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(folder / "best") == first
    assert find_checkpoint(folder / "latest") == find_checkpoint(second) == second
    assert not list(folder.glob("*.partial"))


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    made = [make_checkpoint(tmp_path, step) for step in range(1, 7)]
    (tmp_path / ".step-00000009.partial").mkdir()
    point(tmp_path / "best", made[1], 50.0)
    prune(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.glob("*step-*")) == [made[1].name, made[4].name, made[5].name]
    assert all(not faults(p) for p in (made[1], made[4], made[5]))


@pytest.mark.slow
def test_a_crash_at_any_write_point_leaves_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    done = forked.run(forked.ROOT, "tests.checkpoint_crashes", str(tmp_path), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    crashes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for damaged in (False, True):
        points = [crash for crash in crashes if crash["damaged"] == damaged]
        assert sum(crash["died"] for crash in points) >= 9
        found = [crash["found"] for crash in points]
        assert set(found) == {2, 4}, points  # never none
        assert found == sorted(found), points  # and once the newer one is there, it stays
        assert not points[-1]["died"]
        assert any(crash["point"].startswith("half of") for crash in points)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def add(path: Path, name: str, *, listed: bool) -> None:
    """One more file, with its size and digest in the manifest or not."""
    (path / name).write_bytes(b"other")
    if listed:
        about = {"bytes": 5, "sha256": hashlib.sha256(b"other").hexdigest()}
        change(path, lambda manifest: manifest["files"].update({name: about}))


def unlist(path: Path, name: str) -> None:
    (path / name).unlink()
    change(path, lambda manifest: manifest["files"].pop(name))


MODEL = "model-00000-of-00001.safetensors"


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (
            lambda path: add(path, "model-00001-of-00001.safetensors", listed=False),
            "is not in manifest.json: remove",
        ),
        (lambda path: add(path, "model-99999-of-99999.safetensors", listed=True), "model files of more than 1 ranks"),
        (lambda path: add(path, "model-00000-of-00001.007.safetensors", listed=True), "does not list all of model"),
        (lambda path: add(path, "drift.safetensors", listed=False), "drift.safetensors is not in manifest.json"),
        (lambda path: add(path, "hook.py", listed=True), "lists hook.py, which is no part of a checkpoint"),
        (lambda path: change(path, lambda m: m.update(files={})), "lists no files"),
        (lambda path: change(path, lambda m: m.update(files=[])), "lists no files"),
        (
            lambda path: change(path, lambda m: m["files"].update({"../latest": {"bytes": 1, "sha256": ""}})),
            "names '../la",
        ),
        (lambda path: change(path, lambda m: m["files"].update({MODEL: {}})), f"{MODEL} has no size or digest"),
        (lambda path: change(path, lambda m: m.update(world_size=2)), "does not list all of model of rank 0 of 2"),
        (lambda path: change(path, lambda m: m.update(world_size=None)), "world_size is None"),
        (lambda path: change(path, lambda m: m.pop("format")), "has format None"),
        (lambda path: (path / "manifest.json").write_text("[]"), "is no manifest"),
        (lambda path: (path / "manifest.json").write_text("null"), "is no manifest"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff"), "is not valid JSON"),
        (lambda path: unlist(path, MODEL), "does not list all of model of rank 0"),
        (lambda path: unlist(path, "queue-00000-of-00001.safetensors"), "lists no queue files"),
        (lambda path: unlist(path, "recipe.yaml"), "does not list recipe.yaml"),
    ],
)
def test_a_checkpoint_is_what_its_manifest_lists_and_all_that_is_needed(
    tmp_path: Path, attack: Callable[[Path], None], words: str
) -> None:
    older, path = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    attack(path)
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert newest_valid(tmp_path)[0] == older


@pytest.mark.usefixtures("single_process")
def test_a_file_that_is_not_listed_is_not_loaded(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1, say=print)
    writer.begin(1, contents(1, 3))
    assert writer.finish()
    found = find_checkpoint(tmp_path / "latest")
    save_file({"w": torch.zeros(3)}, found / "model-00000-of-00001.zzz.safetensors")
    save_file({"w": torch.zeros(3)}, found / "model-00001-of-00001.safetensors")
    assert checkpoint_weights(found)["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.usefixtures("single_process")
def test_two_writers_have_partial_folders_of_their_own(tmp_path: Path) -> None:
    folders = set()
    for _ in range(2):
        writer = CheckpointWriter(tmp_path, keep_last=1, say=print)
        writer.begin(1, contents(1, 3))
        assert writer._part
        folders.add(writer._part.folder)
        assert writer.finish()
    assert len(folders) == 2


@pytest.mark.usefixtures("single_process")
def test_large_tensors_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "FILE_BYTES", 400)
    tensors = {f"w{i}": torch.arange(float(size)) for i, size in enumerate((30, 250, 1, 0, 99, 100, 101))}
    writer = CheckpointWriter(tmp_path, keep_last=1, say=print)
    writer.begin(7, contents(7, 1) | {"model-00000-of-00001.safetensors": dict(tensors)})
    assert writer.finish()
    found = find_checkpoint(tmp_path / "latest")
    assert len(list(found.glob("model-*.safetensors"))) > 3
    stored = checkpoint_weights(found)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[key], tensors[key]) for key in tensors)


def contents(step: int, size: int) -> Contents:
    part = f"{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    written: Contents = {f"{kind}-{part}": {"w": torch.full((1,), float(step))} for kind in PARTED}
    written[f"model-{part}"] = {"w": torch.full((size,), float(step))}
    return written | (dict.fromkeys(NEEDED, "{}") if dist.get_rank() == 0 else {})


def check_ranks_write_a_checkpoint_together_while_they_go_on() -> None:
    """Votes of all ranks make it valid at one step; a rank whose part cannot be written makes it void on all."""
    folder, rank, world = shared_folder(), dist.get_rank(), dist.get_world_size()
    said: list[str] = []
    writer = CheckpointWriter(folder, keep_last=1, say=said.append)
    writer.begin(3, contents(3, 200_000))
    for _ in range(10_000):
        votes = torch.tensor(writer.vote())
        dist.all_reduce(votes)
        if writer.settle(*votes.tolist()):
            break
    else:
        raise AssertionError("never valid")
    assert not writer.finish()  # nothing is being written
    dist.barrier()
    assert newest_valid(folder) == (folder / step_name(3), [])
    dist.barrier()
    unwritable = contents(4, 10)
    if rank == world - 1:
        unwritable = {"no/such/folder.json": "{}"}
    writer.begin(4, unwritable)
    assert not writer.finish()
    assert f"rank {world - 1}: " in said[-1]
    assert "step 4 could not be written" in said[-1]
    writer.begin(5, contents(5, 10))
    writer.begin(6, contents(6, 10))  # waits for 5
    assert writer.finish()
    dist.barrier()
    assert sorted(p.name for p in folder.iterdir()) == ["latest", step_name(6)]
    manifest = json.loads((folder / step_name(6) / "manifest.json").read_text())
    assert manifest["world_size"] == world
    assert len(manifest["files"]) == len(PARTED) * world + len(NEEDED)
    dist.barrier()


test_on_ranks = on_ranks(__file__)


@pytest.mark.usefixtures("single_process")
def test_a_full_disk_voids_the_checkpoint_and_keeps_the_one_before(small_disk: Path) -> None:
    said: list[str] = []
    folder = small_disk / "checkpoints"
    writer = CheckpointWriter(folder, keep_last=2, say=said.append)
    writer.begin(1, contents(1, 2_000_000))
    assert writer.finish()
    writer.begin(2, contents(2, 4_000_000))
    assert not writer.finish()
    assert "No space left" in said[0]
    assert newest_valid(folder) == (folder / step_name(1), [])
    writer.begin(3, contents(3, 2_000_000))  # what was begun is out of the way again
    assert writer.finish()
    assert find_checkpoint(folder) == folder / step_name(3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("last.ckpt", "a checkpoint of Lightning is not read"),
        ("step-00000002/model.bin", "is one file of a checkpoint"),
    ],
)
def test_a_file_given_for_a_checkpoint_is_told_in_one_line(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    (tmp_path / name).write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=words) as caught:
        find_checkpoint(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
