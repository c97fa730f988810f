"""Checkpoints written behind the training's back, and made valid by all ranks together.

Each rank copies its part to CPU memory and continues to train; a thread writes it. The step's own all-reduce carries a
vote of who has finished; when all have, a thread of rank 0 writes the manifest and renames the folder, and votes for
all ranks when that is on the disk. A part that could not be written makes the checkpoint void on all ranks and ends
nothing.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.files import file_sha256, sync, write_whole
from configs.ranks import from_rank_0
from configs.tensors import save_tensors
from trainer.checkpoint import Contents
from trainer.checkpoint_folder import point, prune, step_name
from trainer.manifest import FORMAT, MANIFEST

FILE_BYTES = 1 << 28


@dataclass
class _Part:
    """What this rank is writing."""

    step: int
    folder: Path
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and digest of each file, once written
    error: str = ""
    thread: threading.Thread | None = None
    parts_are_written: bool = False  # every rank's; what is left is rank 0's

    def note(self, name: str) -> None:
        """Notes size and digest of a file that is written."""
        file = self.folder / name
        self.files[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


class CheckpointWriter:
    """Writes one checkpoint at a time into `folder`; every rank has one and calls its methods at the same steps."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        say: Callable[[str], None],
        before_valid: Callable[[], None] = lambda: None,
    ) -> None:
        """`say` prints on rank 0, and `before_valid` is called there, in a thread, before a checkpoint becomes valid.

        Leftovers of an earlier writing in `folder` are removed: its lock must be held.
        """
        self.folder, self.keep_last, self.say, self._before_valid = folder, keep_last, say, before_valid
        self.device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        self._part: _Part | None = None
        if dist.get_rank() == 0 and folder.is_dir():
            for partial in folder.glob(".step-*.partial"):
                shutil.rmtree(partial)
        self._own = from_rank_0(lambda: secrets.token_hex(4))  # no other writer has it in its partial names

    def begin(self, step: int, contents: Contents) -> None:
        """Starts to write the checkpoint of `step`; one that is still being written is finished first."""
        self.finish()
        part = _Part(step, self.folder / f".{step_name(step)}.{self._own}.partial")
        self._part = part
        _start(part, lambda: _write(part, contents))

    def vote(self) -> tuple[float, float]:
        """(1, 0) once this rank's part is written, (0, 1) once it has failed, else (0, 0); to be summed over ranks.

        Once all parts are written, rank 0 votes for all of them on the whole, and the others do not vote.
        """
        part = self._part
        if part is None or (part.thread is not None and part.thread.is_alive()):
            return 0.0, 0.0
        weight = 1.0
        if part.parts_are_written:
            weight = float(dist.get_world_size()) if dist.get_rank() == 0 else 0.0
        return (0.0, weight) if part.error else (weight, 0.0)

    def settle(self, written: float, failed: float) -> bool:
        """Starts what follows once the sums of the votes say that all are done; whether the checkpoint became valid."""
        if self._part is None or written + failed < dist.get_world_size():
            return False
        part = self._part
        if failed:
            self._part = None
            errors: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(errors, part.error)
            if dist.get_rank() == 0:
                shutil.rmtree(part.folder, ignore_errors=True)
            why = next(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
            self.say(f"[yellow]checkpoint of step {part.step} could not be written ({why}); training continues")
            return False
        if part.parts_are_written:
            self._part = None
            return True
        part.parts_are_written, part.thread = True, None
        listed: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(listed, part.files)
        if dist.get_rank() == 0:
            files = {name: about for one in listed for name, about in one.items()}
            _start(part, lambda: self._make_valid(part, files))
        return False

    def finish(self) -> bool:
        """Waits for what is being written, on all ranks; False if that is void, or nothing was being written."""
        valid = False
        while self._part is not None:
            if self._part.thread is not None:
                self._part.thread.join()
            votes = torch.tensor(self.vote(), device=self.device)
            dist.all_reduce(votes)
            written, failed = votes.tolist()
            valid = self.settle(written, failed)
        return valid

    def _make_valid(self, part: _Part, files: dict[str, dict[str, Any]]) -> None:
        missing = [name for name in files if not (part.folder / name).is_file()]
        if missing:
            raise OSError(
                f"{part.folder / missing[0]} of another rank is not there; --output must be on a disk that nodes share"
            )
        self._before_valid()
        manifest = {"format": FORMAT, "step": part.step, "world_size": dist.get_world_size(), "files": files}
        write_whole(part.folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)
        final = self.folder / step_name(part.step)
        if final.exists():
            shutil.rmtree(final)
        part.folder.rename(final)
        sync(self.folder)
        point(self.folder / "latest", final)
        prune(self.folder, self.keep_last)


def _start(part: _Part, work: Callable[[], None]) -> None:
    """Starts `work` in a thread of its own, which leaves in the part's `error` why it failed."""

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - safetensors has its own kinds for a full disk; told by all ranks
            part.error = " ".join(str(error).split()) or type(error).__name__

    part.thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
    part.thread.start()


def _write(part: _Part, contents: Contents) -> None:
    part.folder.mkdir(parents=True, exist_ok=True)
    for content_name, content in contents.items():
        if isinstance(content, str):
            write_whole(part.folder / content_name, content, durable=True)
            part.note(content_name)
            continue
        for name, tensors in _pieces(content_name, content):
            save_tensors(tensors, part.folder / name)
            sync(part.folder / name)
            part.note(name)


def _pieces(name: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Tensors in files of about `FILE_BYTES`, taken out of `tensors` as they go: safetensors copies what it writes."""
    if sum(tensor.nbytes for tensor in tensors.values()) <= FILE_BYTES:
        yield name, tensors
        return
    stem, number = name.removesuffix(".safetensors"), 0
    while tensors:
        piece, size = {}, 0
        while tensors and size < FILE_BYTES:
            key = next(iter(tensors))
            piece[key] = tensors.pop(key)
            size += piece[key].nbytes
        yield f"{stem}.{number:03d}.safetensors", piece
        number += 1
