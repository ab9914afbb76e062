"""Failure detection: if a rank crashes or hangs, the others stop within seconds and name it.

1. Every rank writes a heartbeat into the store of the process groups: the activity it begins.
2. A rank asks all others for their state if it fails, loses a connection, or makes no progress
   for the timeout.
3. On each rank a watchdog thread answers, also while the main thread is blocked.
4. A rank that reported no failure and does not answer has ended or hangs. The lowest rank that
   answers prints this, and all ranks end.
5. Calls of the store may block for ever if the network fails. So a second thread, which uses
   neither the store nor a socket, ends the process a few seconds after the others should have.

    error: rank 1 ended or hangs (no answer; last in step 4). …
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import DistError, PrefixStore, Store

from megatron_prefix.distributed.verdict import (
    State,
    failure_message,
    first_alive,
    is_connection_loss,
    position_of,
)
from megatron_prefix.errors import InputError, RunError, Stopped
from megatron_prefix.launcher import write_error_file
from megatron_prefix.text import counted

ANSWER_S = 3.0
"""Seconds that a rank may take to answer, in addition to two rounds of its watchdog."""
LAST_S = 9.0
"""Seconds after the timeout at which a process ends, whatever its other threads wait for."""
HOLD_S = 2.0
"""Seconds that the other ranks give a failed rank, and themselves, to print its own message."""
ENDING_S = 20.0
"""Seconds that closing the process groups may take after an error."""
MARGIN_S = 60.0
"""Seconds that the timeout of the process groups is longer, so that it never comes first."""

PLAIN_ERRORS = (InputError, RunError, Stopped)
"""Errors that are printed as one message, without a traceback."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a command; within training steps they first finish the step."""
SignalHandler = Callable[[int, FrameType | None], Any] | int | None
"""What `signal.signal` takes and returns."""


class Terminated(Stopped):
    """A signal outside training steps, where there is no step to finish."""


class FailureDetection:
    """One rank's part of failure detection: a context around the work that ranks do together.

    An exception that leaves the context becomes a RunError that names the failed rank. If that
    rank is this one, the exception stays as it is. Its `printed_by_this_process` is set then.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        # A connection of its own: calls of the other one may block.
        own_connection = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        self._store = PrefixStore("alive", own_connection)
        self._store.set_timeout(timedelta(seconds=ANSWER_S))
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        # A timeout of 10 minutes is watched every second, one of 5 seconds every 0.5.
        self._interval = min(1.0, timeout_s / 10)
        self._main_thread = threading.get_ident()
        self._doing, self._num_beats = "starting", 0
        self._is_ending, self._is_closed = threading.Event(), threading.Event()
        self._is_told = threading.Event()
        """The states of the ranks are known, so that one of them prints a message."""
        self._previous: dict[int, SignalHandler] = {}

    def beat(self, doing: str) -> None:
        """Heartbeat: report the activity that begins, such as "step 12", and restart the
        timeout."""
        self._doing = doing
        self._num_beats += 1
        self._store.set(f"doing/{self._rank}", doing)

    def __enter__(self) -> FailureDetection:
        self._previous = self._on_signals(dict.fromkeys(ENDING_SIGNALS, _terminate))
        self.beat("starting")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        threading.Thread(target=self._end_at_last, name="last deadline", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_own_end = error is None or type(error) is Stopped
        if is_own_end or not isinstance(error, Exception):  # the latter: KeyboardInterrupt, exit
            with contextlib.suppress(DistError):
                self._report("done" if is_own_end else "failed", text=type(error).__name__)
            self.close()
            self._on_signals(self._previous)
            return
        # The launcher sends SIGTERM when the first rank has ended: the message comes first.
        self._on_signals(dict.fromkeys(ENDING_SIGNALS, signal.SIG_IGN))
        self._is_ending.set()
        explained = self._explain(error)
        self._is_told.set()
        if explained is not error:
            raise explained from error

    def _on_signals(self, handlers: Mapping[int, SignalHandler]) -> dict[int, SignalHandler]:
        """Set handlers by signal and return the previous ones. A signal that is ignored stays so
        (nohup). Python allows this in the main thread only; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
        }

    def close(self) -> None:
        """Stop the watchdog."""
        self._is_closed.set()

    def _explain(self, error: Exception) -> Exception:
        """The exception to raise if this rank ended with `error`."""
        try:
            if isinstance(error, Terminated) or is_connection_loss(error):
                return self._explain_loss(error)
            return self._explain_own(error)
        except DistError:
            store_gone = RunError(
                "the process groups' store does not answer: rank 0, or its launcher, has ended, "
                f"or its node cannot be reached ({self._doing}). Look at its log"
            )
            store_gone.printed_by_this_process = True
            return store_gone

    def _explain_own(self, error: Exception) -> Exception:
        """This rank failed by itself: report it, and print it here unless others already did."""
        if not isinstance(error, PLAIN_ERRORS):
            self._report("failed", text=f"{type(error).__name__}: {error}")
            self._store.compare_set("asked", "", "failed")
            return error  # Python prints its traceback
        self._report("failed", text=str(error))
        self._store.compare_set("asked", "", "failed")
        explained = error if self._rank == 0 else type(error)(f"rank {self._rank}: {error}")
        explained.printed_by_this_process = self._claim(0.0 if self._rank == 0 else HOLD_S / 2)
        return explained

    def _explain_loss(self, error: Exception) -> Exception:
        """A signal or a lost connection ended this rank: ask the others who failed."""
        if isinstance(error, Terminated):
            self._report("signalled", text=str(error))
        else:
            self._report("answers")
        self._store.compare_set("asked", "", "lost")
        states = self._states()
        text = self._failure_message(states, "lost")
        explained: RunError | Terminated
        if text is None and isinstance(error, Terminated):
            explained = error
        else:
            explained = RunError(text or f"{_first_line(error)}, although every rank answers")
        is_first = self._rank == first_alive(states)
        explained.printed_by_this_process = self._claim(0.0 if is_first else HOLD_S)
        return explained

    def _watch(self) -> None:
        """The watchdog: answer if asked; ask if this rank made no progress for the timeout."""
        for idle in self._idle_times():
            if self._is_ending.is_set():
                continue
            with contextlib.suppress(DistError):  # the main thread will see it, or has ended
                if idle >= self._timeout_s:
                    self._store.compare_set("asked", "", "late")
                if self._store.check(["asked"]):
                    self._conclude(self._store.get("asked").decode(), idle)

    def _end_at_last(self) -> None:
        """The last deadline: end this process LAST_S after the timeout, or if its end takes too
        long. Nothing in this thread can block."""
        ending, longest_end = 0.0, ANSWER_S + HOLD_S + ENDING_S + 4 * self._interval
        longest_end = min(longest_end, self._timeout_s + LAST_S)
        for idle in self._idle_times():
            is_told = self._is_told.is_set()
            if self._is_ending.is_set():
                ending += self._interval
                is_over = ending > longest_end
            else:
                is_over = idle >= self._timeout_s + LAST_S + (HOLD_S if is_told else 0.0)
            if is_over:
                if not is_told:
                    _print_at_end(self._cut_off())
                os._exit(1)

    def _cut_off(self) -> str:
        """The message of a rank that can neither ask nor answer."""
        return (
            f"rank {self._rank} is cut off in {self._doing}: the process groups' store does not "
            f"answer, and there was no progress for {counted(self._timeout_s / 60, 'minute')} "
            "(parallel.distributed_timeout_minutes). Look at the network between the nodes and at "
            "the node of rank 0"
        )

    def _idle_times(self) -> Iterator[float]:
        """Seconds since the last heartbeat, after each interval until this context is closed.

        Time in which the operating system had stopped this process does not count.
        """
        beats, idle, before = -1, 0.0, time.monotonic()
        while not self._is_closed.wait(self._interval):
            now = time.monotonic()
            # A process that was stopped for an hour returns with one long round: it counts as two
            # rounds.
            passed, before = min(now - before, 2 * self._interval), now
            idle = idle + passed if beats == self._num_beats else 0.0
            beats = self._num_beats
            yield idle

    def _conclude(self, asked: str, idle: float) -> None:
        """Answer for the main thread. If that thread does not end by itself, print which rank
        failed, or leave it to another rank, and end the process."""
        self._report("answers", idle=idle, where=position_of(self._main_thread))
        if self._is_ending.wait(HOLD_S) or self._is_closed.is_set():
            return
        states = self._states()
        self._is_told.set()
        text = self._failure_message(states, asked)
        signals = [s["text"] for s in states.values() if s["kind"] == "signalled"]
        is_signal = text is None and bool(signals)
        if self._claim(0.0 if self._rank == first_alive(states) else HOLD_S):
            default = signals[0] if is_signal else "connections between ranks broke"
            _print_at_end(text or default)
        else:
            time.sleep(HOLD_S)  # so that the launcher sees the failed rank end first
        if not self._is_ending.is_set():
            os._exit(143 if is_signal else 1)

    def _failure_message(self, states: dict[int, State], asked: str) -> str | None:
        keys = {rank: f"doing/{rank}" for rank in range(self._size) if rank not in states}
        silent = {
            rank: self._store.get(key).decode() if self._store.check([key]) else None
            for rank, key in keys.items()
        }
        return failure_message(states, silent, self._timeout_s if asked == "late" else None)

    def _report(self, kind: str, **more: object) -> None:
        state = {"kind": kind, "doing": self._doing, **more}
        self._store.set(f"state/{self._rank}", json.dumps(state))

    def _states(self) -> dict[int, State]:
        """What the ranks reported, after all of them did or the time for it is over."""
        deadline = time.monotonic() + ANSWER_S + 2 * self._interval
        keys = {rank: f"state/{rank}" for rank in range(self._size)}
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        answered = [rank for rank, key in keys.items() if self._store.check([key])]
        return {rank: json.loads(self._store.get(keys[rank])) for rank in answered}

    def _claim(self, after_s: float) -> bool:
        """Whether this rank prints the message: the first one that claims it does. This rank
        lets others claim it for `after_s` seconds."""
        deadline = time.monotonic() + after_s
        while not self._store.check(["told"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        # `add` is atomic: of several ranks only the first gets 1.
        return self._store.add("told", 1) == 1


def ends_at_once(error: BaseException) -> bool:
    """Whether an error leaves no time for anything else: a signal that does not wait for the end of
    a step, or another rank that is gone."""
    return not isinstance(error, Exception) or (
        isinstance(error, Terminated) or is_connection_loss(error)
    )


def _print_at_end(text: str) -> None:
    """Print a message from a thread, while the main thread is blocked."""
    message = f"megatron-prefix: error: {text}"
    os.write(2, f"{message}\n".encode())
    write_error_file(message)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated(f"ended by {signal.Signals(number).name}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
