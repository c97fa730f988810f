"""Streams of the pretend device: what one copies is there for another only after that has waited for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.pretend_device import Device, Elsewhere


class PretendStream:
    """In the place of torch.cuda.Stream."""

    numbers = itertools.count()

    def __init__(self, _: object = None) -> None:
        self.number = next(self.numbers)
        self.pending: list[Callable[[], object]] = []

    def wait_stream(self, other: PretendStream) -> None:
        """All that the other was given is done."""
        while other.pending:
            other.pending.pop(0)()


class PretendStreams:
    """The streams of the pretend device; see `pretend_streams`.

    Until a stream is waited for, what it copies holds other numbers: whoever reads it too early computes with these.
    """

    def __init__(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default = PretendStream()
        self.current = self.default
        self.begun = 0  # copies
        self._users: list[tuple[int, PretendStream]] = []
        monkeypatch.setattr(torch.cuda, "Stream", PretendStream)
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: self.current)
        monkeypatch.setattr(Elsewhere, "record_stream", lambda tensor, stream: self._note(tensor, stream))
        device.copied = self._copied

    def _note(self, tensor: Elsewhere, stream: PretendStream) -> None:
        self._users.append((tensor.held.data_ptr(), stream))

    def uses(self, tensor: Elsewhere, stream: PretendStream) -> bool:
        """Whether the stream is noted as a user of a tensor's memory."""
        return (tensor.held.data_ptr(), stream) in self._users

    @contextmanager
    def _stream(self, stream: PretendStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _copied(self, held: torch.Tensor) -> None:
        if self.current is not self.default:
            arrived = held.clone()
            held.copy_(255 - arrived)
            self.current.pending.append(lambda: held.copy_(arrived))
            self.begun += 1


@contextmanager
def pretend_streams(device: Device) -> Iterator[PretendStreams]:
    """Inside, torch's streams are those of a pretend device."""
    with pytest.MonkeyPatch.context() as patch:
        yield PretendStreams(device, patch)
