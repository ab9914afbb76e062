"""Failure detection with two ranks as threads of this process: what each of them raises.

Ranks that are processes, and those that hang, are in tests/robustness/test_failed_ranks.py.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from megatron_prefix.distributed.liveness import FailureDetection
from megatron_prefix.errors import InputError, RunError, Stopped

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9")


def ended(*actions: Callable[[], None]) -> list[BaseException | None]:
    """The exception with which each rank leaves its context; a rank is a thread."""
    store, errors = HashStore(), [None] * len(actions)
    together = threading.Barrier(len(actions))

    def run(rank: int, action: Callable[[], None]) -> None:
        detection = FailureDetection(store, rank, len(actions), timeout_s=600)
        try:
            with detection:
                detection.beat("step 3")
                together.wait()
                action()
        except BaseException as error:  # noqa: BLE001 - the tests look at it
            errors[rank] = error
        finally:
            detection.close()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_the_rank_that_lost_a_connection_names_the_one_that_failed():
    lost, failed = ended(fail(LOST), fail(InputError("data.train: unreadable")))
    assert isinstance(lost, RunError) and lost.__cause__ is LOST
    assert "rank 1 failed in step 3: data.train: unreadable" in str(lost)
    assert isinstance(failed, InputError) and str(failed) == "rank 1: data.train: unreadable"
    assert lost.printed_by_this_process != failed.printed_by_this_process, "one prints"


def test_a_defect_stays_as_it_is_for_its_traceback():
    defect = KeyError("a defect")
    lost, failed = ended(fail(LOST), fail(defect))
    assert failed is defect
    assert "rank 1 failed in step 3: KeyError: 'a defect'" in str(lost)


def test_an_end_without_failure_is_none():
    assert ended(lambda: None, lambda: None) == [None, None]
    stopped = Stopped("stopped by a signal")
    assert ended(fail(stopped), fail(stopped)) == [stopped, stopped]


def test_lost_connections_although_every_rank_answers():
    errors = ended(fail(LOST), fail(LOST))
    assert all(isinstance(error, RunError) for error in errors)
    assert all("although every rank answers" in str(error) for error in errors)


def test_the_handler_of_sigterm_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    detection = FailureDetection(HashStore(), 0, 1, timeout_s=600)
    with detection:
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(KeyboardInterrupt), FailureDetection(HashStore(), 0, 1, timeout_s=600):
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGTERM) == before
