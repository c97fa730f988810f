"""The store of one start of the ranks: nothing in it is of an earlier start.

torchrun's agent serves one store to all starts of its ranks (`_shared_tcp_store_server`, torch 2.15), and in it torch
keeps addresses under names that are the same at each start. A restarted rank that is ahead of another would find that
one's old address: gloo then waits for ever, as each side believes that the other connects. TORCHELASTIC_RESTART_COUNT
does not tell starts apart: where one node failed and another was told, theirs differ.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_S = 0.01


def store_of_this_start(store: Store, name: str, rank: int, world_size: int, timeout_s: float) -> Store:
    """A part of `store` that these ranks alone have, once all of them have called this; `name` is what it is for.

    Every rank leaves a word of its own and is answered to that word: so neither an old word nor an old answer counts.
    Raises ConnectionError after `timeout_s`, which becomes the store's timeout.
    """
    from torch.distributed import DistStoreError, PrefixStore

    store.set_timeout(timedelta(seconds=timeout_s))
    common, mine = PrefixStore(name, store), uuid.uuid4().hex
    try:
        common.set(f"rank/{rank}", mine)
        if rank == 0:
            _answer(common, PrefixStore(mine, common), mine, world_size, time.monotonic() + timeout_s)
        start = common.get(f"start-of/{mine}").decode()
        common.delete_key(f"start-of/{mine}")
        fresh = PrefixStore(start, common)
        fresh.add("arrived", 1)
        fresh.wait(["all"])
    except (DistStoreError, TimeoutError) as error:
        raise ConnectionError(
            f"rank {rank}: not all of {world_size} ranks arrived within {timeout_s:g} s; see what the others printed"
        ) from error
    return fresh


def _answer(common: Store, fresh: Store, mine: str, world_size: int, deadline: float) -> None:
    """Rank 0's part: names the start to each word that it finds, until all other ranks have arrived by that name."""
    words = [f"rank/{rank}" for rank in range(world_size)]
    common.wait(words)
    answered: set[str] = set()
    while True:
        for word in {one.decode() for one in common.multi_get(words)} - answered:
            common.set(f"start-of/{word}", mine)
            answered.add(word)
        if 1 + fresh.add("arrived", 0) >= world_size:
            break
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_S)
    fresh.set("all", "arrived")
