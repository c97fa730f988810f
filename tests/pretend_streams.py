"""Streams of the pretend device: what one copies is there for another only after that has waited for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.pretend_device import Elsewhere


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


class PretendStreams(TorchFunctionMode):
    """The streams of the pretend device, inside a `with` of it and of this.

    Until a stream is waited for, what it copies holds other numbers: whoever reads it too early computes with these.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.default = PretendStream()
        self.current = self.default
        self.begun = 0  # copies
        self._users: list[tuple[int, PretendStream]] = []
        monkeypatch.setattr(torch.cuda, "Stream", PretendStream)
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: self.current)
        monkeypatch.setattr(Elsewhere, "record_stream", lambda tensor, stream: self._note(tensor, stream))

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

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **dict(kwargs or {}))
        if func is torch.Tensor.to and isinstance(out, Elsewhere) and self.current is not self.default:
            held, arrived = out.held, out.held.clone()
            held.copy_(255 - arrived)
            self.current.pending.append(lambda: held.copy_(arrived))
            self.begun += 1
        return out
