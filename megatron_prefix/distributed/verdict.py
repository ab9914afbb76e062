"""Which rank failed: kinds of errors, the position of a thread, and a message about all ranks."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, cast

from torch.distributed import DistError

from megatron_prefix.platform import side_works
from megatron_prefix.text import counted

MOST_LISTED = 8
"""Ranks that a message names at most."""
CONNECTION_LOSS = re.compile(
    r"gloo|Connection (closed|reset|refused)|Broken pipe|NCCL|Timed out (waiting|after)", re.I
)
WAITING_CALL = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(")
"""A source line on which a rank waits for other ranks, or for a device that waits for them."""
COMMUNICATION = {"distributed_c10d.py", "rendezvous.py"}

State = dict[str, Any]
"""What one rank reported: `kind` is failed, answers, signalled or done; `doing` is its activity.

A failed rank adds `text`. A rank that answers adds `idle`, the seconds since its last heartbeat,
and `where`, its position in the code (None: it waits for other ranks)."""


def is_connection_loss(error: BaseException | None) -> bool:
    """Whether another rank's end caused an error, directly or through the errors before it."""
    while error is not None:
        text = str(error)
        is_runtime = type(error) is RuntimeError
        if isinstance(error, DistError) or (is_runtime and CONNECTION_LOSS.search(text)):
            return True
        # An error on this rank often hides the lost connection before it.
        error = error.__cause__ or error.__context__
    return False


def position_of(thread: int) -> str | None:
    """Position of the main thread `thread` as file:line; None if this process waits for other
    ranks.

    Backward passes on CUDA communicate in a thread of their own, so all threads are looked at, but
    not those of work beside the main thread. If the main thread waits for such work, it is the
    position of that work, with its name and age.
    """
    frames, works = sys._current_frames(), side_works()
    for work in works:
        if work.is_awaited and work.ident in frames:
            top = frames[work.ident]
            return None if _waits(top, [top]) else f"{_place(top)} ({work.described})"
    frame = frames.get(thread)
    others = [top for number, top in frames.items() if number not in {w.ident for w in works}]
    return None if frame is None or _waits(frame, others) else _place(frame)


def _waits(frame: FrameType, tops: Iterable[FrameType]) -> bool:
    """Whether a thread at `frame` waits for other ranks; `tops` are the threads that communicate
    for it."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return bool(WAITING_CALL.search(line)) or any(_files(top) & COMMUNICATION for top in tops)


def _place(frame: FrameType) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def _files(top: FrameType) -> set[str]:
    """Names of the files whose functions a thread is in."""
    names, caller = set[str](), cast(FrameType | None, top)
    while caller is not None:
        names.add(Path(caller.f_code.co_filename).name)
        caller = caller.f_back
    return names


def first_alive(states: dict[int, State]) -> int:
    """The lowest rank that can still print for the others."""
    alive = (rank for rank, state in states.items() if state["kind"] in ("answers", "signalled"))
    return min(alive, default=0)


def failure_message(
    states: dict[int, State], silent: dict[int, str | None], timeout_s: float | None
) -> str | None:
    """Which ranks failed; None if none did.

    `states` has the ranks that reported, `silent` the last activity of those that did not.
    `timeout_s` is set if a rank asked because it made no progress for that long.

    >>> failure_message({0: {"kind": "answers", "doing": "step 4"}}, {1: "step 4"}, None)
    'rank 1 ended or hangs (no answer; last in step 4). Look at its log and its node'
    """
    failures = []
    for rank in sorted({*states, *silent}):
        state = states.get(rank)
        if state is None:
            last = f"last in {silent[rank]}" if silent[rank] else "never seen"
            failures.append(f"rank {rank} ended or hangs (no answer; {last})")
        elif state["kind"] == "failed":
            failures.append(f"rank {rank} failed in {state['doing']}: {state['text']}")
        elif timeout_s is not None and state.get("where") and state["idle"] >= timeout_s / 2:
            failures.append(f"rank {rank} hangs in {state['doing']} at {state['where']}")
    if timeout_s is None:
        return f"{_listed(failures)}. Look at its log and its node" if failures else None
    waiting = [f"rank {rank} waits in {state['doing']}" for rank, state in states.items()]
    return (
        f"no progress for {counted(timeout_s / 60, 'minute')} "
        f"(parallel.distributed_timeout_minutes): {_listed(failures or waiting)}. Look at its log "
        "and its node; if it was only slow, raise the timeout"
    )


def _listed(parts: list[str]) -> str:
    more = "; and others" if len(parts) > MOST_LISTED else ""
    return "; ".join(parts[:MOST_LISTED]) + more
