"""Runs on two nodes whose network can fail.

The nodes are network namespaces of Linux, joined by a pair of virtual devices; that needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import MARK

from megatron_prefix.testing import free_port

ADDRESSES = {"A": "10.77.9.1", "B": "10.77.9.2"}
"""Node A has rank 0 and the store of the process groups."""
START_S = 240
NOBODY = "02:00:00:00:00:01"
"""An Ethernet address that neither device has."""

needs_namespaces = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need Linux, root and the program ip",
)


def run_program(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True)


def other_node(node: str) -> str:
    return "B" if node == "A" else "A"


@dataclass
class Network:
    """Namespaces and devices, named after this process so that two test runs do not meet."""

    mark: str

    def namespace(self, node: str) -> str:
        return f"{self.mark}{node}"

    def device(self, node: str) -> str:
        return f"{self.mark}v{node}"

    def ip(self, node: str, *arguments: str) -> None:
        run_program("ip", "-n", self.namespace(node), *arguments)

    def make(self) -> None:
        first, second = self.device("A"), self.device("B")
        for node in ADDRESSES:
            run_program("ip", "netns", "add", self.namespace(node))
        run_program("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for node, address in ADDRESSES.items():
            device = self.device(node)
            run_program("ip", "link", "set", device, "netns", self.namespace(node))
            self.ip(node, "addr", "add", f"{address}/24", "dev", device)
            self.ip(node, "link", "set", device, "up")
            self.ip(node, "link", "set", "lo", "up")

    def remove(self) -> None:
        for node in ADDRESSES:
            with contextlib.suppress(subprocess.CalledProcessError):
                run_program("ip", "netns", "del", self.namespace(node))

    def switch(self, node: str, state: str) -> None:
        """Turn the link of a node "up" or "down"."""
        self.ip(node, "link", "set", self.device(node), state)

    def lose_packets_from(self, node: str) -> None:
        """What `node` sends arrives nowhere from now on; what it receives still arrives."""
        wrong = ("lladdr", NOBODY, "nud", "permanent", "dev", self.device(node))
        self.ip(node, "neigh", "replace", ADDRESSES[other_node(node)], *wrong)

    def slow_down(self, rate: str) -> None:
        """Limit both directions to a rate such as "500kbit"."""
        for node in ADDRESSES:
            run_program(
                *("tc", "-n", self.namespace(node), "qdisc", "add", "dev", self.device(node)),
                *("root", "tbf", "rate", rate, "burst", "16kb", "latency", "2s"),
            )


@contextlib.contextmanager
def network_of_two() -> Iterator[Network]:
    """A network, or a skipped test where there can be none."""
    network = Network(f"p{os.getpid() % 10**6}")
    try:
        network.make()
    except subprocess.CalledProcessError as error:
        network.remove()
        pytest.skip(f"no network namespaces: {error.stderr.decode().strip()}")
    try:
        yield network
    finally:
        network.remove()


class Nodes:
    """A run with `ranks` ranks on each node; what it prints goes into `folder`/NODE.log."""

    def __init__(self, network: Network, config: str, folder: Path, ranks: int = 1) -> None:
        port, self.folder = free_port(), folder
        self.launchers = {
            node: subprocess.Popen(
                [
                    *("ip", "netns", "exec", network.namespace(node), sys.executable),
                    *("-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks}"),
                    *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES['A']}:{port}"),
                    *("--rdzv-id=links", f"--local-addr={ADDRESSES[node]}", "--max-restarts=0"),
                    f"--rdzv-conf=is_host={int(node == 'A')},join_timeout={START_S}",
                    *("-m", "megatron_prefix", "train", "--config", config),
                ],
                env={
                    **os.environ,
                    "GLOO_SOCKET_IFNAME": network.device(node),
                    "OMP_NUM_THREADS": "1",
                    MARK: network.mark,
                },
                stdout=(folder / f"{node}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            for node in ADDRESSES
        }

    def workers(self, node: str) -> list[int]:
        """Process ids of a node's ranks, in the order of their start."""
        pid = self.launchers[node].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children]

    def all_workers(self) -> list[int]:
        return [worker for node in ADDRESSES for worker in self.workers(node)]

    def text(self, node: str) -> str:
        return (self.folder / f"{node}.log").read_text()

    def texts(self) -> str:
        return self.text("A")[-3000:] + self.text("B")[-3000:]

    def is_running(self) -> bool:
        return any(launcher.poll() is None for launcher in self.launchers.values())

    def kill(self, node: str) -> None:
        """SIGKILL to every process of a node."""
        workers = self.workers(node)
        self.launchers[node].kill()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, 9)

    def end(self) -> None:
        """SIGKILL to the launchers, which their ranks do not outlive."""
        for launcher in self.launchers.values():
            launcher.kill()
            launcher.wait()

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes of the launchers; fails if they do not end in time."""
        deadline = time.monotonic() + timeout_s
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [launcher.poll() for launcher in self.launchers.values()]
        if None in codes:
            text = self.texts()
            self.end()
            raise AssertionError(f"alive after {timeout_s:.0f} s: {text}")
        return codes

    def wait_for_lines(self, output: Path, count: int) -> None:
        """Until the run has `count` lines of metrics."""
        deadline = time.monotonic() + START_S
        while num_lines(output) < count:
            assert time.monotonic() < deadline, f"no progress: {self.texts()}"
            assert self.is_running(), f"ended: {self.texts()}"
            time.sleep(0.02)


def num_lines(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids: list[int], timeout_s: float) -> None:
    """Until all processes have ended; fails if one is alive after `timeout_s`."""
    start = time.monotonic()
    while any(map(is_alive, pids)) and time.monotonic() < start + timeout_s:
        time.sleep(0.1)
    assert not any(map(is_alive, pids)), f"alive after {time.monotonic() - start:.0f} s"
