"""Two nodes whose network fails: each side ends in time and names the rank, or goes on.

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
from commands import command, lines, write_config

from megatron_prefix.testing import free_port

TIMEOUT_S = 12
"""parallel.distributed_timeout_minutes."""
AFTER_S = 10
SLACK_S = 15
"""For a machine under load."""
START_S = 240
NODES = {"A": "10.77.9.1", "B": "10.77.9.2"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need Linux, root and the program ip",
    ),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Network:
    """Namespaces and devices, named after this process so that two test runs do not meet."""

    mark: str

    def namespace(self, node: str) -> str:
        return f"{self.mark}{node}"

    def device(self, node: str) -> str:
        return f"{self.mark}v{node}"

    def make(self) -> None:
        for node in NODES:
            ip("netns", "add", self.namespace(node))
        ip("link", "add", self.device("A"), "type", "veth", "peer", "name", self.device("B"))
        for node, address in NODES.items():
            inside = ("-n", self.namespace(node))
            ip("link", "set", self.device(node), "netns", self.namespace(node))
            ip(*inside, "addr", "add", f"{address}/24", "dev", self.device(node))
            ip(*inside, "link", "set", self.device(node), "up")
            ip(*inside, "link", "set", "lo", "up")

    def remove(self) -> None:
        for node in NODES:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.namespace(node))

    def switch(self, node: str, state: str) -> None:
        """Turn the link of a node "up" or "down"."""
        ip("-n", self.namespace(node), "link", "set", self.device(node), state)


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network(f"p{os.getpid() % 10**6}")
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"no network namespaces: {error.stderr.decode().strip()}")
    yield made
    made.remove()


class Nodes:
    """A run of one rank on each node."""

    def __init__(self, network: Network, config: str, folder: Path) -> None:
        port, self.folder = free_port(), folder
        self.launchers = {
            node: subprocess.Popen(
                [
                    *("ip", "netns", "exec", network.namespace(node), sys.executable),
                    *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                    *("--rdzv-backend=c10d", f"--rdzv-endpoint={NODES['A']}:{port}"),
                    *("--rdzv-id=links", f"--local-addr={NODES[node]}", "--max-restarts=0"),
                    f"--rdzv-conf=is_host={int(node == 'A')},join_timeout={START_S}",
                    *("-m", "megatron_prefix", "train", "--config", config),
                ],
                env={**os.environ, "GLOO_SOCKET_IFNAME": network.device(node)},
                stdout=(folder / f"{node}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            for node in NODES
        }

    def worker(self, node: str) -> int:
        """Process id of a node's rank."""
        pid = self.launchers[node].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def text(self, node: str) -> str:
        return (self.folder / f"{node}.log").read_text()

    def end(self) -> None:
        """SIGKILL to the launchers, which their ranks do not outlive."""
        for launcher in self.launchers.values():
            launcher.kill()
            launcher.wait()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def run(network, dataset, tmp_path) -> Iterator[tuple[Nodes, str]]:
    """A run on both nodes that has taken ten steps, and its configuration."""
    config = write_config(
        tmp_path / "run.yaml",
        dataset,
        tmp_path / "run",
        parallel={"distributed_timeout_minutes": TIMEOUT_S / 60, "use_distributed_optimizer": True},
        train={"steps": 4000, "save_interval": 5},
    )
    nodes = Nodes(network, config, tmp_path)
    try:
        wait_for_steps(tmp_path / "run", 10, nodes)
        yield nodes, config
    finally:
        nodes.end()


def wait_for_steps(output: Path, count: int, nodes: Nodes) -> None:
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + START_S
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < deadline, nodes.text("A")[-2000:] + nodes.text("B")[-2000:]
        time.sleep(0.05)


def test_both_sides_of_a_cut_link_end_in_time(run, network, tmp_path, capsys):
    """Each names what it knows, and the same command resumes."""
    nodes, config = run
    workers = [nodes.worker(node) for node in NODES]
    network.switch("B", "down")
    cut = time.monotonic()
    while any(map(is_alive, workers)) and time.monotonic() < cut + TIMEOUT_S + AFTER_S + SLACK_S:
        time.sleep(0.1)
    assert not any(map(is_alive, workers)), f"alive after {time.monotonic() - cut:.0f} s"
    assert "rank 1 ended or hangs (no answer; last in " in nodes.text("A")
    assert "error: rank 1 is cut off in " in nodes.text("B")
    nodes.end()
    saved = int((tmp_path / "run" / "saved" / "latest_checkpointed_iteration.txt").read_text())
    argv = ["train", "--config", config, f"train.steps={saved + 2}"]
    assert command(argv, capsys)[0] == 0
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, saved + 3))


def test_a_run_goes_on_after_a_link_was_down_for_less_than_the_timeout(run, network, tmp_path):
    nodes, _ = run
    network.switch("B", "down")
    time.sleep(TIMEOUT_S / 3)
    network.switch("B", "up")
    done = (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n")
    wait_for_steps(tmp_path / "run", done + 10, nodes)
    assert all(is_alive(nodes.worker(node)) for node in NODES)
    assert "error" not in nodes.text("A") + nodes.text("B")
