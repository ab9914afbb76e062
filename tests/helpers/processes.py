"""Other processes for tests: forked from one that has imported the program and run nothing.

So a process costs no imports: the first of a test session takes some seconds, each later one a
fraction of one. An action has to pickle: a function of a module, or a partial of one. torchrun is
tested in tests/robustness.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.testing import free_port

Action = Callable[[], int | None]
"""Returns an exit code; None is 0."""
PRELOADED = ["megatron_prefix.train.run", "megatron_prefix.train.scoring"]
REST_S = 60
"""Seconds that the other ranks may take to end after one has failed."""


def start(action: Action, log: Path, **env: str) -> multiprocessing.Process:
    """Start `action` with these environment variables; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_logged, args=(action, str(log), env), daemon=True)
    process.start()
    return process


def _logged(action: Action, log: str, env: dict[str, str]) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.update(env)
    sys.exit(action() or 0)


def forked(action: Action, log: Path, timeout_s: float) -> int:
    """Run `action` in another process. Returns its exit code, below 0 for a signal."""
    process = start(action, log)
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"no end in {timeout_s} s: {log.read_text()[-2000:]}")
    return process.exitcode


@dataclass
class Ranks:
    """Ranks of one run that meet as torchrun's do, without a launcher above them."""

    processes: list[multiprocessing.Process]
    logs: list[Path]

    def is_running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def ranks(self) -> list[int]:
        """Their process ids."""
        return [process.pid for process in self.processes]

    def text(self) -> str:
        """What all of them printed, rank by rank."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def wait(self, timeout_s: float) -> list[int | None]:
        """The exit codes; None for a rank that did not end, and is killed."""
        deadline = time.monotonic() + timeout_s
        while self.is_running() and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + REST_S)
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        """SIGKILL to all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def start_ranks(count: int, action: Action, folder: Path) -> Ranks:
    """Start `action` on `count` ranks; `folder` gets a log of each."""
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder / f"rank{rank}-of-{count}.log" for rank in range(count)]
    return Ranks(
        [
            start(action, log, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", **world)
            for rank, log in enumerate(logs)
        ],
        logs,
    )


def on_ranks(count: int, action: Action, folder: Path, timeout_s: float) -> None:
    """Run `action` on `count` ranks; all have to exit with 0."""
    ranks = start_ranks(count, action, folder)
    codes = ranks.wait(timeout_s)
    assert codes == [0] * count, f"exit codes {codes} (None: no end)\n{ranks.text()[-4000:]}"
