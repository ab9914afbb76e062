"""Directories belong to one live run: refused, taken over, given back."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from processes import start

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed import join_world, owned, ownership
from megatron_prefix.distributed.ownership import LOCK_FILE
from megatron_prefix.errors import InputError

LIMIT_S = 60


def _own(directory: Path, then: str) -> int:
    """Own the directory in a process of its own, and end as `then` says."""
    with join_world(ParallelConfig(), 0) as world, owned({"train.save": str(directory)}, world):
        if then == "fork":  # a child of the owner outlives it
            if os.fork() == 0:
                time.sleep(5)
            os._exit(0)
        (directory / "owned").touch()
        time.sleep(LIMIT_S)
    return 0


def _write_for_long(path: Path) -> int:
    with path.open("r"):
        (path.parent / "writing").touch()
        time.sleep(LIMIT_S)
    return 0


def _appears(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


@pytest.fixture
def saved(tmp_path) -> Path:
    (tmp_path / "saved").mkdir()
    return tmp_path / "saved"


@pytest.fixture
def owner(saved, tmp_path):
    process = start(partial(_own, saved, "wait"), tmp_path / "log")
    _appears(saved / "owned")
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_with_the_first_one_named(saved, owner, world, monkeypatch, capsys):
    monkeypatch.setattr(ownership, "WAIT_S", 0.1)
    with (
        pytest.raises(InputError, match="wait for its end") as refused,
        owned({"train.save": str(saved)}, world),
    ):
        raise AssertionError("owned by two")
    text = f"train.save = {saved} belongs to a run that is alive (host {socket.gethostname()}, "
    assert text + f"process {owner.pid}, started 20" in str(refused.value)
    assert "waiting up to" in capsys.readouterr().out
    assert owner.is_alive() and (saved / LOCK_FILE).exists()


def test_a_start_waits_for_an_owner_that_ends(saved, owner, world, capfd):
    os.kill(owner.pid, signal.SIGSTOP)
    resume = partial(os.kill, owner.pid, signal.SIGKILL)
    threading.Timer(1.0, resume).start()
    with owned({"train.save": str(saved)}, world):
        assert json.loads((saved / LOCK_FILE).read_text())["process"] == os.getpid()
    printed = capfd.readouterr().out
    assert "waiting up to" in printed
    assert f"taken over from a run that was killed (host {socket.gethostname()}, " in printed
    assert f"process {owner.pid}, " in printed
    assert not (saved / LOCK_FILE).exists()


def test_a_child_of_the_owner_does_not_inherit_the_lock(saved, tmp_path, world, monkeypatch):
    monkeypatch.setattr(ownership, "WAIT_S", 0.1)
    process = start(partial(_own, saved, "fork"), tmp_path / "log")
    process.join(LIMIT_S)
    with owned({"train.save": str(saved)}, world):
        pass


def test_a_leftover_writer_of_a_dead_run_is_ended_first(saved, tmp_path, world, capsys):
    (saved / LOCK_FILE).touch()
    writer = start(partial(_write_for_long, saved / LOCK_FILE), tmp_path / "writer.log")
    bystander = start(partial(time.sleep, LIMIT_S), tmp_path / "bystander.log")
    _appears(saved / "writing")
    host = socket.gethostname()
    processes = [
        [host, writer.pid],
        [host, bystander.pid],
        ["elsewhere", 1],
        "damaged",
        [host, "x"],
    ]
    record = {"host": host, "process": 1, "started": "then", "processes": processes}
    (saved / LOCK_FILE).write_text(json.dumps(record))
    with owned({"train.save": str(saved)}, world):
        writer.join(LIMIT_S)
        assert writer.exitcode == -signal.SIGKILL
        assert bystander.is_alive(), "it has the number, but not the lock file open"
    printed = capsys.readouterr().out
    assert f"ended its processes {writer.pid}; its processes on elsewhere end by" in printed
    bystander.kill()


def test_one_directory_for_both_settings(tmp_path, world):
    both = {"logging.output": str(tmp_path), "train.save": f"{tmp_path}/."}
    for _ in range(2):
        with owned(both, world):
            assert (tmp_path / LOCK_FILE).exists()
        assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("error", [InputError, KeyError])
def test_the_file_is_left_if_ranks_may_be_left(tmp_path, world, error):
    with pytest.raises(error), owned({"train.save": str(tmp_path)}, world):
        raise error("x")
    assert (tmp_path / LOCK_FILE).exists() == (error is KeyError)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "[1]", '{"processes": 5}', "\0"])
def test_a_damaged_lock_file_is_taken_over(tmp_path, world, text):
    (tmp_path / LOCK_FILE).write_text(text)
    with owned({"train.save": str(tmp_path)}, world):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()


def test_a_link_in_its_place_is_not_followed(tmp_path, world):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with (
        pytest.raises(InputError, match=f"{LOCK_FILE} cannot be used"),
        owned({"train.save": str(tmp_path)}, world),
    ):
        raise AssertionError("owned")
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_file_system_without_locks_is_mentioned(tmp_path, world, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(ownership.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "lockf", refuse)
    with owned({"train.save": str(tmp_path)}, world):
        assert "this file system has no locks" in capsys.readouterr().out
