"""A signal asks for a stop; a second one ends the process; the handlers come back."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest
from processes import forked

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed import StopRequest, join_world
from megatron_prefix.distributed.signals import SIGNALS

LIMIT_S = 60


@pytest.fixture(autouse=True)
def not_under_nohup():
    """The tests may themselves run under `nohup`, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_the_handler_returns(world, number):
    before = signal.getsignal(number)
    with StopRequest(world) as stop:
        assert signal.getsignal(number) != before
        assert not stop.is_asked()
        os.kill(os.getpid(), number)
        assert stop.is_asked() and stop.is_asked()
    assert signal.getsignal(number) == before


def _receive(*numbers: int) -> int:
    """The process gets the signals, and is then in C code for a while. 7 is a stop on request."""
    with join_world(ParallelConfig(), 0) as world, StopRequest(world) as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
            for _ in range(10**4):  # until the handler runs
                pass
        time.sleep(0.5)
        return 7 if stop.is_asked() else 0


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, -signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT, -signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGHUP, signal.SIGHUP, 7),
        (signal.SIGUSR1, signal.SIGTERM, 7),
        (signal.SIGTERM, signal.SIGHUP, 7),
    ],
)
def test_a_second_signal(tmp_path, first, second, code):
    assert forked(partial(_receive, first, second), tmp_path / "log", LIMIT_S) == code


def test_a_closed_terminal_is_ignored_under_nohup(world):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(world) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
