"""Ownership of output directories: one live run per directory.

    DIRECTORY/run.lock    JSON: host, process and start of the owner, and all processes of its run

Rank 0 holds a lock of the operating system (POSIX, fcntl) on the file. The kernel releases it when
that process ends, however it ends, and no child process inherits it. A run that ends in order
removes the file. So a file without a lock belongs to a run that was killed: the next start ends
the processes of that run that are left on this host, and takes the directory over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prefix.distributed.world import World
from megatron_prefix.errors import InputError, RunError, Stopped

LOCK_FILE = "run.lock"
WAIT_S = 30.0
"""Seconds that a start waits for an owner that is still ending."""
ROUND_S = 0.5
"""Seconds between two attempts; all ranks report a heartbeat after each."""
KILL_S = 10.0
"""Seconds that a left-over process may take to end after SIGKILL."""
LARGEST_RECORD = 1 << 20
"""Bytes of a lock file that are read."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Error numbers of a file system that has no locks."""


@contextlib.contextmanager
def owned(directories: dict[str, str], world: World) -> Iterator[None]:
    """Own `directories` (setting -> path) inside the context. Collective.

    They exist. Raises InputError on every rank if another live run still owns one after WAIT_S
    seconds.
    """
    processes = world.gather((socket.gethostname(), os.getpid()))
    distinct = world.once(lambda: _distinct(directories))
    locks = [_Lock(setting, Path(path)) for setting, path in distinct.items()]
    descriptors: list[int] = []
    ends_in_order = False
    try:
        for lock in locks:
            _take(lock, processes, world)
        if not world.is_main:  # so that a later run recognises this process
            descriptors += [fd for lock in locks if (fd := _open_to_be_recognised(lock)) >= 0]
        yield
        ends_in_order = True
    except (InputError, RunError, Stopped):
        ends_in_order = True  # all ranks end; with another error some may be left
        raise
    finally:
        for fd in descriptors:
            os.close(fd)
        for lock in locks:
            lock.release(removes_file=ends_in_order)


def _distinct(directories: dict[str, str]) -> dict[str, str]:
    """Without a directory given twice: a process that closes its second descriptor of a file loses
    the lock."""
    by_identity: dict[tuple[int, int], tuple[str, str]] = {}
    for setting, path in directories.items():
        status = os.stat(path)
        by_identity.setdefault((status.st_dev, status.st_ino), (setting, path))
    return dict(by_identity.values())


def _take(lock: _Lock, processes: list[tuple[str, int]], world: World) -> None:
    """Take one lock on rank 0, with heartbeats of all ranks while it waits. Collective."""
    deadline = time.monotonic() + WAIT_S
    is_first = True
    while True:
        world.beat(f"taking {lock.setting}")

        def attempt(is_first: bool = is_first) -> tuple[bool, bool]:
            if not is_first:
                time.sleep(ROUND_S)
            return lock.try_take(processes), time.monotonic() < deadline

        is_taken, may_wait = world.once(attempt)
        if is_taken:
            return
        if not may_wait:
            world.once(lock.refuse)
        if is_first and world.is_main:
            print(f"{lock.belongs()}: waiting up to {WAIT_S:g} s for its end", flush=True)
        is_first = False


def _open_to_be_recognised(lock: _Lock) -> int:
    """A descriptor of the lock file, -1 if there is none (another node may not see it yet)."""
    try:
        return os.open(lock.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1


@dataclass
class _Lock:
    """The lock of one directory; only rank 0 takes it."""

    setting: str
    directory: Path
    descriptor: int = -1
    owner: dict[str, Any] = field(default_factory=dict)
    """What the file said about another run."""

    @property
    def path(self) -> Path:
        return self.directory / LOCK_FILE

    def try_take(self, processes: list[tuple[str, int]]) -> bool:
        """Whether this process owns the directory now. Raises InputError if it cannot be locked."""
        try:
            return self._try_take(processes)
        except OSError as error:
            raise InputError(
                f"{self.setting} = {self.directory}: {LOCK_FILE} cannot be used "
                f"({error.strerror}); name a directory that can be written"
            ) from None

    def _try_take(self, processes: list[tuple[str, int]]) -> bool:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(descriptor)
                print(
                    f"warning: {self.setting} = {self.directory}: this file system has no locks "
                    f"({error.strerror}), so a second run in it would not be noticed",
                    flush=True,
                )
                return True
            self.owner = _record(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        if not _is_in_place(descriptor, self.path):  # its owner removed it at this moment
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        if owner := _record(descriptor):
            self.owner = owner
            self._take_over(owner)
        self._write(processes)
        return True

    def _take_over(self, owner: dict[str, Any]) -> None:
        """End the processes of a dead run that are left on this host, and print it."""
        ended = _end_writers(owner, self.path)
        elsewhere = sorted({host for host, _ in _processes(owner)} - {socket.gethostname()})
        print(
            f"{self.setting} = {self.directory}: taken over from a run that was killed "
            f"({_described(owner)})"
            + (f"; ended its processes {', '.join(map(str, ended))}" if ended else "")
            + (f"; its processes on {', '.join(elsewhere)} end by themselves" if elsewhere else ""),
            flush=True,
        )

    def _write(self, processes: list[tuple[str, int]]) -> None:
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "processes": processes,
        }
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, (json.dumps(record) + "\n").encode(), 0)

    def belongs(self) -> str:
        """Whose directory it is, as the beginning of a message."""
        return (
            f"{self.setting} = {self.directory} belongs to a run that is alive "
            f"({_described(self.owner)})"
        )

    def refuse(self) -> None:
        """Raise the InputError that names the owner."""
        raise InputError(f"{self.belongs()}: wait for its end, stop it, or name another directory")

    def release(self, removes_file: bool) -> None:
        """Give the directory back. The file is removed while the lock is still held."""
        if self.descriptor < 0:
            return
        if removes_file:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self.descriptor)
        self.descriptor = -1


def _is_in_place(descriptor: int, path: Path) -> bool:
    """Whether `path` still is the file of `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _record(descriptor: int) -> dict[str, Any]:
    """What an owner wrote; empty for an empty or damaged file."""
    try:
        record = json.loads(os.pread(descriptor, LARGEST_RECORD, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _described(owner: dict[str, Any]) -> str:
    if not owner:
        return f"its {LOCK_FILE} does not name it"
    host, process, started = (str(owner.get(k))[:100] for k in ("host", "process", "started"))
    return f"host {host}, process {process}, started {started}"


def _processes(owner: dict[str, Any]) -> list[tuple[str, int]]:
    """Host and process id of each rank of a run, as far as the record is sound."""
    listed = owner.get("processes")
    return [
        (entry[0], entry[1])
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and type(entry[1]) is int
    ]


def _end_writers(owner: dict[str, Any], path: Path) -> list[int]:
    """SIGKILL to the processes of a dead run on this host; returns those that were alive.

    A process is one of them if the record lists it and it has the lock file open. So a process
    that got the same number later is left alone.
    """
    host = socket.gethostname()
    left = [
        process
        for name, process in _processes(owner)
        if name == host and process != os.getpid() and _has_open(process, path)
    ]
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + KILL_S
    while any(_has_open(process, path) for process in left) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _has_open(process: int, path: Path) -> bool:
    """Whether a process has the file open, by /proc; False outside Linux."""
    try:
        status = os.stat(path)
        for descriptor in os.scandir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(status, os.stat(descriptor.path)):
                    return True
    except OSError:
        pass
    return False
