"""Attempts in one store do not see each other's keys; ranks are threads here."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import DistStoreError, HashStore

from megatron_prefix.distributed.attempt import store_of_attempt

TIMEOUT = timedelta(seconds=20)


def attempt(store: HashStore, size: int) -> list:
    """The stores that the ranks of one attempt get."""
    stores = [None] * size

    def join(rank: int) -> None:
        stores[rank] = store_of_attempt(store, rank, size, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in reversed(threads):  # rank 0 comes last
        thread.start()
    for thread in threads:
        thread.join()
    return stores


def test_ranks_of_an_attempt_share_a_store_and_no_key_of_an_earlier_one():
    store = HashStore()
    first = attempt(store, 3)
    first[1].set("state/1", "failed")
    assert first[0].get("state/1") == first[2].get("state/1") == b"failed"
    second = attempt(store, 3)
    assert not any(part.check(["state/1"]) for part in second)
    second[0].set("state/0", "answers")
    assert second[2].get("state/0") == b"answers" and not first[0].check(["state/0"])


def test_the_greeting_of_a_dead_process_is_passed_over():
    store = HashStore()
    store.set("hello/1", "of a process that died before it was answered")
    first, other = attempt(store, 2)
    first.set("x", "1")
    assert other.get("x") == b"1"


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(DistStoreError, match="rank 1 did not come"):
        store_of_attempt(HashStore(), 0, 2, timedelta(seconds=0.05))
