"""A signal asks for a stop; a second one has its usual effect; the handlers come back."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_prefix.distributed import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_the_handler_returns(world, number):
    before = signal.getsignal(number)
    with StopRequest(world) as stop:
        assert signal.getsignal(number) != before
        assert not stop.is_asked()
        os.kill(os.getpid(), number)
        assert stop.is_asked() and stop.is_asked()
        assert signal.getsignal(number) == before, "a second signal would be taken too"
    assert signal.getsignal(number) == before


def test_the_second_interrupt_interrupts(world):
    with pytest.raises(KeyboardInterrupt), StopRequest(world) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_asked()
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**6):  # until the handler runs
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
