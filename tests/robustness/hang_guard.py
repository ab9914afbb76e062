"""A time limit for what runs in the test's own process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 20
"""Seconds after which a case hangs."""


@contextmanager
def limited(case: object, limit_s: int = LIMIT_S) -> Iterator[None]:
    """A context that raises AssertionError if it takes longer than `limit_s` seconds."""

    def late(number, frame):
        raise AssertionError(f"case {case} hangs")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
