"""Ranks tell one another how they are, so that none waits for ever for one that is gone.

Every rank writes into the process groups' store what it begins to do (`beat`). The first that
fails, loses a connection, or does not get on for the timeout asks all for their state. A thread
beside each rank's work answers where that can not. Whoever neither failed nor answers ended or
hangs, and the lowest rank that is left says so; all end within seconds.

    error: rank 1 ended or hangs (no answer; last in step 4). …
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType

from torch.distributed import DistError, PrefixStore, Store

from megatron_prefix.distributed.verdict import is_lost, lowest, verdict, where
from megatron_prefix.errors import InputError, RunError, Stopped

ANSWER_S = 5.0
"""How long a rank may take to answer, beyond two rounds of its watch."""
HOLD_S = 2.0
"""How long the others leave a failed rank, and themselves, to say it in their own words."""
ENDING_S = 20.0
"""How long process groups may take to be taken down behind an error."""
MARGIN_S = 60.0
"""By how much the groups' own timeout is longer, so that it never speaks first."""


class Terminated(Stopped):
    """SIGTERM where no step is there to be finished."""


class Liveness:
    """One rank's part; a context around all that the ranks do together.

    On leaving with an exception it becomes a RunError that names the rank to blame, or stays as
    it is where this rank is; `printed_by_this_process` then
    tells whether this process prints it.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        self._store = PrefixStore("alive", store.clone())  # beside what waits in the other
        self._store.set_timeout(timedelta(seconds=ANSWER_S))
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._interval = min(2.0, timeout_s / 10)
        self._worker = threading.get_ident()
        self._doing, self._num_beats = "starting", 0
        self._is_ending, self._is_closed = threading.Event(), threading.Event()
        self._previous: object = signal.SIG_DFL

    def beat(self, doing: str) -> None:
        """Say what this rank begins to do, such as "step 12"; its timeout begins anew."""
        self._doing = doing
        self._num_beats += 1
        self._store.set(f"doing/{self._rank}", doing)

    def __enter__(self) -> Liveness:
        self._previous = self._on_sigterm(_terminate)
        self.beat("starting")
        threading.Thread(target=self._watch, name="liveness", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_own_end = error is None or type(error) is Stopped
        if is_own_end or not isinstance(error, Exception):  # or an interrupt, which is not ours
            with contextlib.suppress(DistError):
                self._mark("done" if is_own_end else "failed", text=type(error).__name__)
            self.close()
            self._on_sigterm(self._previous)
            return
        # The launcher's, when the first rank has ended; it must not cut off what is said.
        self._on_sigterm(signal.SIG_IGN)
        self._is_ending.set()
        found = self._explained(error)
        if found is not error:
            raise found from error

    def _on_sigterm(self, handler: object) -> object:
        """Set the handler, where Python lets this thread, and return the one before."""
        if threading.current_thread() is not threading.main_thread():
            return signal.SIG_DFL
        return signal.signal(signal.SIGTERM, handler)

    def close(self) -> None:
        """Watch no longer."""
        self._is_closed.set()

    def _explained(self, error: Exception) -> Exception:
        """What this rank raises where it ended with `error`."""
        is_signal = isinstance(error, Terminated)
        try:
            if not is_signal and not is_lost(error):
                text = str(error) if _is_plain(error) else f"{type(error).__name__}: {error}"
                self._mark("failed", text=text)
                self._store.compare_set("asked", "", "failed")
                if not _is_plain(error):
                    return error  # Python prints its traceback
                found = error if self._rank == 0 else type(error)(f"rank {self._rank}: {error}")
                found.printed_by_this_process = self._claim(0.0 if self._rank == 0 else HOLD_S / 2)
                return found
            self._mark("signalled" if is_signal else "answers")
            self._store.compare_set("asked", "", "lost")
            states = self._states()
            text = self._verdict(states, "lost")
            if text is None and is_signal:
                found = error
            else:
                found = RunError(text or f"{_first_line(error)}, though every rank answers")
            found.printed_by_this_process = self._claim(0.0 if self._rank == lowest(states) else HOLD_S)
        except DistError:
            found = RunError(
                "the process groups' store does not answer: rank 0, or its launcher, has ended, "
                f"or its node cannot be reached ({self._doing}). Look at its log"
            )
            found.printed_by_this_process = True
        return found

    def _watch(self) -> None:
        """Until the end: answer when asked, ask when nothing has moved for the timeout.

        Time in which this process itself was stopped does not count.
        """
        beats, idle, ending, before = -1, 0.0, 0.0, time.monotonic()
        while not self._is_closed.wait(self._interval):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self._interval), now
            idle = idle + passed if beats == self._num_beats else 0.0
            beats = self._num_beats
            if self._is_ending.is_set():
                ending += passed
                if ending > ANSWER_S + HOLD_S + ENDING_S + 4 * self._interval:
                    os._exit(1)
                continue
            with contextlib.suppress(DistError):  # the work itself will see it, or has ended
                if idle >= self._timeout_s:
                    self._store.compare_set("asked", "", "late")
                if self._store.check(["asked"]):
                    self._conclude(self._store.get("asked").decode(), idle)

    def _conclude(self, asked: str, idle: float) -> None:
        """Answer for the rank's work, and end the process with it unless it ends by itself."""
        self._mark("answers", idle=idle, where=where(self._worker))
        if self._is_ending.wait(HOLD_S) or self._is_closed.is_set():
            return
        states = self._states()
        text = self._verdict(states, asked)
        is_signal = text is None and any(s["kind"] == "signalled" for s in states.values())
        if self._claim(0.0 if self._rank == lowest(states) else HOLD_S):
            said = text or ("ended by SIGTERM" if is_signal else "connections between ranks broke")
            os.write(2, f"megatron-prefix: error: {said}\n".encode())
        else:
            time.sleep(HOLD_S)  # so that the launcher sees the one to blame end first
        if not self._is_ending.is_set():
            os._exit(143 if is_signal else 1)

    def _verdict(self, states: dict[int, dict], asked: str) -> str | None:
        keys = {rank: f"doing/{rank}" for rank in range(self._size) if rank not in states}
        seen = {
            rank: self._store.get(key).decode() if self._store.check([key]) else None
            for rank, key in keys.items()
        }
        return verdict(states, seen, self._timeout_s if asked == "late" else None)

    def _mark(self, kind: str, **more: object) -> None:
        state = {"kind": kind, "doing": self._doing, **more}
        self._store.set(f"state/{self._rank}", json.dumps(state))

    def _states(self) -> dict[int, dict]:
        """What the ranks marked, once all have or had the time to."""
        deadline = time.monotonic() + ANSWER_S + 2 * self._interval
        keys = {rank: f"state/{rank}" for rank in range(self._size)}
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        marked = [rank for rank, key in keys.items() if self._store.check([key])]
        return {rank: json.loads(self._store.get(keys[rank])) for rank in marked}

    def _claim(self, after_s: float) -> bool:
        """Whether it is for this rank to speak; it leaves it to others for `after_s`."""
        deadline = time.monotonic() + after_s
        while not self._store.check(["told"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._store.add("told", 1) == 1


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated("ended by SIGTERM")


def _is_plain(error: Exception) -> bool:
    return isinstance(error, (InputError, RunError, Stopped))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
