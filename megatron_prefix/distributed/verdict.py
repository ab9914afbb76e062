"""Who is to blame where ranks wait: an error's kind, a thread's place, a verdict over ranks."""

from __future__ import annotations

import linecache
import re
import sys
from pathlib import Path

from torch.distributed import DistError

LISTED = 8
"""Ranks that a message names at most."""
LOST = re.compile(
    r"gloo|Connection (closed|reset|refused)|Broken pipe|NCCL|Timed out (waiting|after)", re.I
)
WAITS = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(")
"""Lines on which a rank waits for others, or for its device, which waits for them."""
COMMUNICATION = ("distributed_c10d.py", "rendezvous.py")


def is_lost(error: BaseException | None) -> bool:
    """Whether another rank's end is behind an error, or behind what it was raised from."""
    while error is not None:
        text = str(error)
        if isinstance(error, DistError) or (type(error) is RuntimeError and LOST.search(text)):
            return True
        error = error.__cause__ or error.__context__
    return False


def where(thread: int) -> str | None:
    """Where a thread is, as file:line; None where it, or one beside it, waits for other ranks.

    Backward passes on CUDA communicate in a thread of their own.
    """
    frames = sys._current_frames()
    frame = frames.get(thread)
    if frame is None or WAITS.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)):
        return None
    for own in frames.values():
        while own is not None:
            if Path(own.f_code.co_filename).name in COMMUNICATION:
                return None
            own = own.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


def lowest(states: dict[int, dict]) -> int:
    """The lowest rank that is left to speak for others."""
    left = (rank for rank, state in states.items() if state["kind"] in ("answers", "signalled"))
    return min(left, default=0)


def verdict(
    states: dict[int, dict], seen: dict[int, str | None], timeout_s: float | None
) -> str | None:
    """Who is to blame, in words; None where nobody is.

    `states` is what ranks marked: kind `failed` (with text), `answers`, `signalled` or `done`,
    what they were doing, and, where a rank asked that waited for `timeout_s`, for how long and
    where they are (None: they wait for others). `seen` is what the silent ones did last.

    >>> verdict({0: {"kind": "answers", "doing": "step 4"}}, {1: "step 4"}, None)
    'rank 1 ended or hangs (no answer; last in step 4). Its own log and node say more'
    """
    said = []
    for rank in sorted({*states, *seen}):
        state = states.get(rank)
        if state is None:
            last = f"last in {seen[rank]}" if seen[rank] else "never seen"
            said.append(f"rank {rank} ended or hangs (no answer; {last})")
        elif state["kind"] == "failed":
            said.append(f"rank {rank} failed in {state['doing']}: {state['text']}")
        elif timeout_s is not None and state.get("where") and state["idle"] >= timeout_s / 2:
            said.append(f"rank {rank} hangs in {state['doing']} at {state['where']}")
    if timeout_s is None:
        return f"{_listed(said)}. Its own log and node say more" if said else None
    said = said or [f"rank {rank} waits in {state['doing']}" for rank, state in states.items()]
    return (
        f"nothing moved for {timeout_s / 60:g} minutes (parallel.distributed_timeout_minutes): "
        f"{_listed(said)}. Its own log and node say more; raise the timeout if it was only slow"
    )


def _listed(said: list[str]) -> str:
    return "; ".join(said[:LISTED]) + ("; and others" if len(said) > LISTED else "")
