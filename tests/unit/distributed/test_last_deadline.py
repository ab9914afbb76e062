"""A process ends when it cannot reach the store at all: the store's process is stopped here."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from processes import start
from torch.distributed import DistError, TCPStore

from megatron_prefix.distributed import liveness
from megatron_prefix.distributed.liveness import FailureDetection
from megatron_prefix.testing import free_port

TIMEOUT_S, LAST_S = 2.0, 2.0
LIMIT_S = 60
SLACK_S = 12.0
"""For a machine under load."""


def _serve(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=LIMIT_S))
    store.set("served", "")
    time.sleep(3 * LIMIT_S)


def _work(port: int, folder: Path, then: str) -> None:
    """Rank 1 of two, which loses the store while it waits for rank 0, or fails."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT_S))
    store.wait(["served"])
    liveness.LAST_S = LAST_S
    with FailureDetection(store, 1, 2, TIMEOUT_S) as detection:
        detection.beat("step 3")
        (folder / "began").touch()
        while not (folder / "cut").exists():
            time.sleep(0.01)
        if then == "fails":
            raise DistError("Connection closed by peer")
        store.get("never")


@pytest.mark.parametrize("then", ["waits", "fails"])
def test_a_process_that_is_cut_off_ends_and_prints_it(tmp_path, then):
    port = free_port()
    server = start(partial(_serve, port), tmp_path / "server.log")
    worker = start(partial(_work, port, tmp_path, then), tmp_path / "worker.log")
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline and worker.exitcode is None
        time.sleep(0.01)
    os.kill(server.pid, signal.SIGSTOP)
    (tmp_path / "cut").touch()
    began = time.monotonic()
    worker.join(LIMIT_S)
    took = time.monotonic() - began
    assert worker.exitcode == 1, (tmp_path / "worker.log").read_text()
    assert took < TIMEOUT_S + LAST_S + SLACK_S
    (message,) = (tmp_path / "worker.log").read_text().splitlines()
    assert message.startswith("megatron-prefix: error: rank 1 is cut off in step 3: the process ")
    worker.kill()
    server.kill()
