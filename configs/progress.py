"""How long work tells how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class OnProgress(Protocol):
    """Called with the items that are done, how many there are in all (None: as said before), and a note on the work."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


def untold(done: int, total: int | None = None, note: str = "") -> None:
    """Progress that nobody wants to know."""


@dataclass(frozen=True)
class PartOf:
    """Progress of a part, told as progress of the whole: `before` items are done, each of the part counts `each`."""

    whole: OnProgress
    total: int
    note: str = ""
    before: int = 0
    each: int = 1

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:  # noqa: ARG002
        self.whole(min(self.total, self.before + done * self.each), self.total, note or self.note)
