"""What an index says of a photograph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from eval.index.estimate import Estimate


@dataclass(frozen=True)
class Candidate:
    """A photograph of the index that may show a query's place."""

    number: int
    """Its row in the index."""
    name: str
    """Its name below `root`, as it was indexed."""
    root: str
    """The folder, or address of a shard set, that it was read from."""
    similarity: float
    """Cosine of the two descriptors, -1 to 1."""
    matches: float | None
    """Re-ranking's score: matched patches that agree on one shift. None without re-ranking, or beyond its depth."""
    lat: float
    """Degrees; NaN where unknown."""
    lon: float
    east: float
    """Metres of UTM zone `zone`, or of a map without a name if that is 0; NaN where unknown."""
    north: float
    zone: int
    apart_m: float
    """Metres from the first candidate; NaN where a position is unknown."""


@dataclass(frozen=True)
class Location:
    """Where one photograph was taken, as far as the index can say."""

    query: str
    """The file's name, or `image N` for what has none."""
    candidates: tuple[Candidate, ...]
    """The best first; those of `rerankvpr eval` in its order. Empty if the photograph could not be read."""
    position: Estimate | None
    """None if no candidate has a position."""
    confidence: float
    """Held against `threshold`; see `eval.index.verdict`. NaN where nothing was learned."""
    threshold: float
    """From here on a photograph is taken to be of the map; NaN where too few images taught nothing."""
    in_map: bool | None
    """Whether to believe it; None where there is no threshold."""
    patches: int = 0
    """Salient patches of the query, of which `matches` are some."""
    error: str = ""
    """Why the photograph could not be read; empty if it was."""
    descriptor: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    """The query's global descriptor, L2-normalised; None if the photograph could not be read."""

    @property
    def best(self) -> Candidate | None:
        """The first candidate."""
        return self.candidates[0] if self.candidates else None


@dataclass
class Tally:
    """How many photographs were located, in words of a line."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, location: Location) -> None:
        """Counts one."""
        verdict = {True: "in the map", False: "uncertain", None: "without a verdict"}[location.in_map]
        self.counts["not readable" if location.error else verdict] += 1

    def __str__(self) -> str:
        order = ("in the map", "uncertain", "without a verdict", "not readable")
        told = ", ".join(f"{self.counts[what]:,} {what}" for what in order if self.counts[what])
        return f"{self.counts.total():,} photograph{'s' if self.counts.total() != 1 else ''}: {told}"


@dataclass(frozen=True)
class Found:
    """What retrieval and re-ranking find for Q queries: K candidates each, the best first; -1 stands for none."""

    ids_QK: NDArray[np.int64]
    similarities_QK: NDArray[np.float32]
    matches_QK: NDArray[np.float32]  # NaN where there was no matching
    keys_QK: NDArray[np.float64]  # what sorted them; NaN as above
    patches_Q: NDArray[np.int64]


def stacked(parts: Sequence[Found]) -> Found:
    """What was found for several lists of queries, one list after another."""
    return Found(*(np.concatenate([getattr(part, of.name) for part in parts]) for of in fields(Found)))


def nothing_found(queries: int) -> Found:
    """What an empty index finds for some queries."""
    nothing = np.zeros((queries, 0))
    return Found(
        nothing.astype(np.int64),
        nothing.astype(np.float32),
        nothing.astype(np.float32),
        nothing,
        np.zeros(queries, np.int64),
    )
