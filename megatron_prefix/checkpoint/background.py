"""A save in the background (`train.async_save`): a thread of each process writes, training goes on.

1. `start` begins a save. One is in flight at a time, so it comes after `wait`.
2. `check`, after every step, ends a save that is done on all processes, and raises its error.
3. `wait` waits for the save in flight; `leave` does so on the way out of a run that has failed.
4. `give_up` is for a process that must end at once: what is not published by then never is.

The threads communicate over a group of their own. Writing has no deadline, because training makes
progress meanwhile; who waits for it has one (see distributed/liveness.py). The kernel ends the
threads with their process, so a killed run writes nothing more.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_prefix.checkpoint.collective import Group, is_main
from megatron_prefix.errors import RunError
from megatron_prefix.platform import SideWork

WRITING = timedelta(days=1)
"""How long a process's thread may write before the other ones see an error."""
OTHERS_S = 10.0
"""Seconds that this process's thread may take to end after another one's has failed."""
ROUND_S = 0.1
"""Seconds between two looks at the other processes while this one waits."""
NOTICED_S = 0.01
"""Waiting for a shorter time than this is not worth a message."""


class GivenUp(Exception):
    """The run ends before the checkpoint is published."""


class BackgroundSave:
    """At most one save that is in flight, of all processes together.

    `host` is a group of all processes on the host, which the training loop uses, too; None is the
    default one.
    """

    def __init__(self, host: Group = None) -> None:
        self._host = host
        self._group: Group = None
        self._thread: SideWork | None = None
        self._error: BaseException | None = None
        self._step = 0
        self._publishing = threading.Lock()
        self._is_given_up = False
        self._is_told = False

    def start(self, step: int, write: Callable[[Group], None]) -> None:
        """Begin the save of `step`: `write` gets the group to communicate over. Collective."""
        assert self._thread is None
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=WRITING)
        self._step, self._error = step, None
        work = f"the background write of the checkpoint of step {step}"
        self._thread = SideWork(work, lambda: self._run(write))
        self._thread.start()

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Context of what changes the run's checkpoints, which must be quick: `give_up` waits for
        it. Raises GivenUp if it must not any more."""
        with self._publishing:
            if self._is_given_up:
                raise GivenUp
            yield

    def check(self) -> None:
        """End a save that is done on all processes. Collective.

        Raises the save's error, on all processes at the same step.
        """
        if self._thread is None:
            return
        is_running = self._thread.is_alive()
        has_failed = not is_running and self._error is not None
        states = torch.tensor([is_running, has_failed], dtype=torch.int32)
        dist.all_reduce(states, dist.ReduceOp.MAX, self._host)
        any_running, any_failed = states.tolist()
        if any_failed:
            self._thread.join(OTHERS_S)
            error, self._thread = self._error, None
            raise error or RunError(
                f"train.async_save: the checkpoint of step {self._step} could not be written by "
                "another process; earlier checkpoints are unchanged. Look at its message"
            )
        if not any_running:
            self._thread = None

    def wait(self) -> None:
        """Wait for the save in flight. Collective. Raises its error, on all processes."""
        thread = self._thread
        if thread is None:
            return
        with thread.awaited():
            while self._thread is not None:
                thread.join(ROUND_S)
                self.check()

    def wait_before(self, step: int) -> None:
        """`wait` before the save of `step`, and say once that this made training wait."""
        if self._thread is None:
            return
        start, before = time.monotonic(), self._step
        self.wait()
        seconds = time.monotonic() - start
        if seconds >= NOTICED_S and not self._is_told and is_main():
            print(
                f"train.async_save: the save of step {step} waited {seconds:.1f} s for that of step"
                f" {before}: raise train.save_interval, or save to a faster disk",
                flush=True,
            )
            self._is_told = True

    def leave(self) -> None:
        """Let the save in flight end, and print its failure: the run fails for another reason."""
        if self._thread is None:
            return
        with self._thread.awaited():
            self._thread.join()
        error, self._thread = self._error, None
        if error is not None and is_main():
            print(error, file=sys.stderr, flush=True)

    def give_up(self) -> None:
        """Publish nothing from now on. Waits only for what is being published."""
        with self._publishing:
            self._is_given_up = True

    def _run(self, write: Callable[[Group], None]) -> None:
        try:
            write(self._group)
        except BaseException as error:  # raised by the main thread
            self._error = error
