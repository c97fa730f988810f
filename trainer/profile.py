"""Where the time of a few steps goes, and what holds memory: a trace for each rank, on a GPU a snapshot beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from configs.files import partial_of, remove
from configs.reading import is_out_of_memory
from configs.traced import part, spans
from trainer.context import Context
from trainer.trace_file import rewrite

MEMORY_EVENTS = 200_000


class StepProfile:
    """Traces the steps of trainer.profile_steps into `profile/` of the output folder; does nothing without them.

    `rank-00000.json.gz` opens in ui.perfetto.dev: the parts of each step by name, what the loader's
    threads did meanwhile, and the memory held as a curve. On a GPU `memory-rank-00000.pickle` comes beside it (for
    pytorch.org/memory_viz). Both are written if memory runs out in one of these steps, too.
    """

    def __init__(self, context: Context) -> None:
        self.first, self.last = context.recipe.trainer.profile_steps or (-1, -1)
        self.folder, self.rank, self.say = context.recipe.output / "profile", context.rank, context.say
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds the step of this number, its data excluded."""
        if self._profiler is None and self.first <= number <= self.last:
            self._start()
        try:
            with part(f"step {number}"):
                yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self.stop()
            raise
        if self._profiler is not None and number >= self.last:
            self._stop()

    def stop(self) -> None:
        """Writes what there is, for a training that ends before or in the last of these steps."""
        if self._profiler is not None:
            self._stop()

    @property
    def _on_gpu(self) -> bool:
        return self.rank.device.type == "cuda"

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each rank reports as an error that it found no GPU
        spans.clear()
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def _stop(self) -> None:
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._path("", "json.gz")
            raw = partial_of(path.with_suffix(""))
            try:
                profiler.export_chrome_trace(str(raw))
                try:
                    rewrite(raw, path, list(spans), rank=self.rank.rank, world_size=self.rank.world_size)
                except (MemoryError, ValueError, KeyError) as error:  # torch's own file opens in a viewer, too
                    own = raw.replace(path.with_suffix(""))
                    self.say(f"[yellow]{own.name} is as torch wrote it, without the loader's threads ({error!r})")
            finally:
                remove(raw)
        except OSError as error:
            self.say(f"[yellow]the trace could not be written to {self.folder} ({error})")
        else:
            self.say(f"steps {self.first} to {self.last}: traces of all ranks are in {self.folder}")
        self._write_memory()

    def _write_memory(self) -> None:
        if not self._on_gpu:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path("memory-", "pickle")))
        except OSError as error:
            self.say(f"[yellow]the memory snapshot could not be written to {self.folder} ({error})")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _path(self, kind: str, suffix: str) -> Path:
        return self.folder / f"{kind}rank-{self.rank.rank:05d}.{suffix}"


@contextmanager
def waits_told(mode: Literal["off", "warn", "error"], device: torch.device) -> Iterator[None]:
    """Inside, torch warns or raises where the host waits for a GPU; elsewhere nothing changes."""
    if mode == "off" or device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
