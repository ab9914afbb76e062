"""Which rank failed: from what ranks reported, from an error, from where a thread is."""

from __future__ import annotations

import linecache
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from megatron_prefix.distributed.verdict import (
    failure_message,
    first_alive,
    is_connection_loss,
    position_of,
)
from megatron_prefix.errors import InputError
from megatron_prefix.platform import SideWork


def test_the_message_names_ended_ranks_first():
    waits = {"kind": "answers", "doing": "step 4", "idle": 60.0, "where": None}
    busy = {**waits, "where": "train/trainer.py:9"}
    failed = {"kind": "failed", "doing": "step 4", "text": "disk full"}
    assert failure_message({0: waits, 1: waits}, {}, None) is None
    gone = failure_message({0: waits}, {2: None}, None)
    assert "rank 2 ended or hangs (no answer; never seen)" in gone
    assert "rank 1 failed in step 4: disk full" in failure_message({0: waits, 1: failed}, {}, None)
    assert "rank 1" not in (failure_message({0: waits, 1: busy}, {2: "step 3"}, None) or "")
    late = failure_message({0: waits, 1: busy}, {}, 60.0)
    assert "no progress for 1 minute " in late and "rank 0" not in late
    assert "rank 1 hangs in step 4 at train/trainer.py:9" in late
    young = {**busy, "idle": 1.0}
    assert "rank 0 waits in step 4; rank 1 waits" in failure_message({0: waits, 1: young}, {}, 60.0)
    assert failure_message({}, {rank: "step 1" for rank in range(99)}, None).count("rank ") == 8


def test_lost_connections_are_distinguished_from_own_errors():
    gloo = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9")
    wrapped = InputError("not a checkpoint")
    wrapped.__cause__ = gloo
    assert is_connection_loss(gloo) and is_connection_loss(wrapped)
    assert not is_connection_loss(RuntimeError("shape mismatch"))
    assert not is_connection_loss(InputError("x"))


def test_the_lowest_rank_that_answers_prints():
    states = {0: {"kind": "failed"}, 2: {"kind": "signalled"}, 1: {"kind": "done"}}
    assert first_alive(states) == 2
    assert first_alive({0: {"kind": "failed"}}) == 0


def blocked_in(source: str, file: str) -> str | None:
    """Position of a thread that runs `source`, and waits there for `lock`, in a file of this name.

    `waiter.wait()` is a call of another language, as those of torch are.
    """
    lock = threading.Lock()
    waiter = SimpleNamespace(wait=lock.acquire)
    is_there = threading.Event()
    code = compile(f"is_there.set()\n{source}", file, "exec")
    linecache.cache[file] = (0, None, ["\n", source], file)
    names = {"is_there": is_there, "lock": lock, "waiter": waiter}
    with lock:
        thread = threading.Thread(target=exec, args=(code, names))
        thread.start()
        is_there.wait()
        while sys._current_frames()[thread.ident].f_lineno != 2:
            time.sleep(0.001)
        position = position_of(thread.ident)
    thread.join()
    del linecache.cache[file]
    return position


def test_a_thread_that_waits_for_other_ranks_has_no_position():
    assert blocked_in("lock.acquire()", "/somewhere/train/own.py") == "train/own.py:2"
    assert blocked_in("waiter.wait()", "/somewhere/train/own.py") is None
    assert blocked_in("lock.acquire()", "/torch/distributed/distributed_c10d.py") is None
    assert position_of(-1) is None  # it has ended


def test_work_that_the_main_thread_waits_for_has_a_name_an_age_and_a_place():
    """A rank whose own write goes on in code is named; one whose write waits for others is not."""
    code = "go.set()\nlock.acquire()"
    for file, is_waiting in (("/somewhere/own.py", False), ("/torch/distributed_c10d.py", True)):
        lock, go = threading.Lock(), threading.Event()
        names = {"go": go, "lock": lock}
        stalled = compile(code, file, "exec")
        with lock:
            work = SideWork("the write of 4", partial(exec, stalled, names))
            work._begin -= 75
            work.start()
            go.wait()
            while sys._current_frames()[work.ident].f_lineno != 2:
                time.sleep(0.001)
            own = blocked_in("lock.acquire()", "/somewhere/train/own.py")
            assert own == "train/own.py:2", "the main thread does not wait for it"
            with work.awaited():
                place = position_of(threading.get_ident())
        work.join()
        expected = None if is_waiting else "somewhere/own.py:2 (the write of 4, since 75 s)"
        assert place == expected
    with work.awaited():
        assert "(the write" not in (position_of(threading.get_ident()) or ""), "it has ended"


@pytest.mark.parametrize(
    ("kind", "position"), [(threading.Thread, None), (SideWork, "train/own.py:2")]
)
def test_another_thread_may_communicate_for_it(kind, position):
    """As the thread of a backward pass on CUDA does; that of a save in the background does not."""
    inner = compile("go.set()\nlock.acquire()", "/torch/distributed/distributed_c10d.py", "exec")
    lock, go = threading.Lock(), threading.Event()
    names = {"go": go, "lock": lock}
    with lock:
        action = partial(exec, inner, names)
        thread = kind("x", action) if kind is SideWork else kind(target=action)
        thread.start()
        go.wait()
        assert blocked_in("lock.acquire()", "/somewhere/train/own.py") == position
    thread.join()
