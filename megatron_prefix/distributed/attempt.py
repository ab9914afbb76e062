"""A store of its own for each attempt that torchrun makes in one job (`--max-restarts`).

torchrun keeps one store for all attempts, with the keys of processes that have ended. Its count of
restarts differs between nodes, so it cannot name an attempt. Rank 0 draws a name, and answers each
rank under a word that only the living process of that rank knows:

    hello/1          = 8f3a…    rank 1's process greets; a dead one's word may be there before it
    welcome/8f3a…    = 07c1…    rank 0's answer to that word: the name of the attempt
    07c1…/joined/1              rank 1 has read it
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store

ROUND_S = 0.01
"""Seconds between two looks at the greetings."""


def store_of_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """The part of `store` that only the living processes of this attempt use. Collective.

    Raises DistStoreError if a rank does not come within `timeout`.
    """
    if rank == 0:
        name = _welcome(store, size, timeout)
    else:
        word = uuid.uuid4().hex
        store.set(f"hello/{rank}", word)
        store.wait([f"welcome/{word}"], timeout)
        name = store.get(f"welcome/{word}").decode()
        store.set(f"{name}/joined/{rank}", "")
    return PrefixStore(name, store)


def _welcome(store: Store, size: int, timeout: timedelta) -> str:
    """Answer until every other rank has joined. Returns the name of the attempt."""
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    answered: dict[int, bytes] = {}
    waiting = set(range(1, size))
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"{name}/joined/{rank}"]):
                waiting.discard(rank)
            elif store.check([f"hello/{rank}"]):
                word = store.get(f"hello/{rank}")
                if answered.get(rank) != word:
                    store.set(f"welcome/{word.decode()}", name)
                    answered[rank] = word
        if waiting and time.monotonic() > deadline:
            raise DistStoreError(f"rank {min(waiting)} did not come")
        if waiting:
            time.sleep(ROUND_S)
    return name
