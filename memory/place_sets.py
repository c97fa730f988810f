"""The data sets that places are of, and which images of a batch are of which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from configs.host_copies import to_device


class Rows(NamedTuple):
    """A set's rows of a global batch, ascending, on the host and on the device."""

    host_n: torch.Tensor
    device_n: torch.Tensor


class PlaceSets:
    """Data sets by number: places `first_place[s]` to `first_place[s + 1]` are those of set s.

    `names` are those of S sets, `weights` those of their losses; `first_place` has S + 1 numbers.
    """

    def __init__(self, names: Sequence[str], first_place: Sequence[int], weights: Sequence[float]) -> None:
        self.names, self.weights = list(names), list(weights)
        self._bounds = torch.tensor(list(first_place)[1:-1], dtype=torch.int64)
        self._known: tuple[torch.Tensor, list[Rows]] | None = None

    def __len__(self) -> int:
        """S."""
        return len(self.names)

    def rows(self, host_ids_N: torch.Tensor, device: torch.device) -> list[Rows]:
        """The rows of each set, of images of these places; the host does not wait for the device."""
        sets_N = torch.bucketize(host_ids_N, self._bounds, right=True)
        known = self._known
        if known is None or not torch.equal(known[0], sets_N) or known[1][0].device_n.device != device:
            hosts = [(sets_N == number).nonzero()[:, 0] for number in range(len(self))]
            known = self._known = sets_N, [Rows(host_n, to_device(host_n, device)) for host_n in hosts]
        return known[1]
