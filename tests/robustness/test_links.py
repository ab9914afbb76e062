"""Two nodes whose network fails: each side ends in time and names the rank, or goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import command, lines, write_config
from nodes import (
    Network,
    Nodes,
    is_alive,
    needs_namespaces,
    network_of_two,
    num_lines,
    wait_for_end,
)

TIMEOUT_S = 12
"""parallel.distributed_timeout_minutes."""
AFTER_S = 10
SLACK_S = 15
"""For a machine under load."""

pytestmark = [pytest.mark.slow, needs_namespaces]


@pytest.fixture
def network() -> Iterator[Network]:
    with network_of_two() as made:
        yield made


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
        nodes.wait_for_lines(tmp_path / "run", 10)
        yield nodes, config
    finally:
        nodes.end()


def ends_in_time(workers: list[int]) -> None:
    wait_for_end(workers, TIMEOUT_S + AFTER_S + SLACK_S)


def resumes(config: str, output: Path, capsys) -> None:
    """The same command on one process, two steps behind the newest checkpoint."""
    saved = int((output / "saved" / "latest_checkpointed_iteration.txt").read_text())
    argv = ["train", "--config", config, f"train.steps={saved + 2}"]
    assert command(argv, capsys)[0] == 0
    assert [row["step"] for row in lines(output)] == list(range(1, saved + 3))


def test_both_sides_of_a_cut_link_end_in_time(run, network, tmp_path, capsys):
    """Each names what it knows, and the same command resumes."""
    nodes, config = run
    workers = nodes.all_workers()
    network.switch("B", "down")
    ends_in_time(workers)
    assert "rank 1 ended or hangs (no answer; last in " in nodes.text("A")
    assert "error: rank 1 is cut off in " in nodes.text("B")
    nodes.end()
    resumes(config, tmp_path / "run", capsys)


@pytest.mark.parametrize("sender", ["A", "B"])
def test_packets_that_are_lost_one_way_end_both_sides_in_time(
    run, network, tmp_path, capsys, sender
):
    nodes, config = run
    workers = nodes.all_workers()
    network.lose_packets_from(sender)
    ends_in_time(workers)
    assert "rank 1 ended or hangs (no answer; last in " in nodes.text("A")
    assert "error: rank 1 is cut off in " in nodes.text("B")
    nodes.end()
    resumes(config, tmp_path / "run", capsys)


def test_a_run_goes_on_after_a_link_was_down_for_less_than_the_timeout(run, network, tmp_path):
    nodes, _ = run
    network.switch("B", "down")
    time.sleep(TIMEOUT_S / 3)
    network.switch("B", "up")
    nodes.wait_for_lines(tmp_path / "run", num_lines(tmp_path / "run") + 10)
    assert all(map(is_alive, nodes.all_workers()))
    assert "error" not in nodes.text("A") + nodes.text("B")


def test_a_run_goes_on_over_a_slow_link(run, network, tmp_path):
    """At a rate at which a step takes a large part of the timeout."""
    nodes, _ = run
    network.slow_down("500kbit")
    before, start = num_lines(tmp_path / "run"), time.monotonic()
    nodes.wait_for_lines(tmp_path / "run", before + 8)
    assert time.monotonic() - start > 1, "the link was not slow"
    assert all(map(is_alive, nodes.all_workers()))
    assert "error" not in nodes.text("A") + nodes.text("B")


def test_a_node_whose_processes_are_killed_ends_the_other(run, tmp_path, capsys):
    nodes, config = run
    left = nodes.workers("A")
    nodes.kill("B")
    ends_in_time(left)
    assert "rank 1 ended or hangs (no answer; last in " in nodes.text("A")
    nodes.end()
    resumes(config, tmp_path / "run", capsys)


def test_the_node_of_the_store_killed_ends_the_other(run, tmp_path, capsys):
    nodes, config = run
    left = nodes.workers("B")
    nodes.kill("A")
    ends_in_time(left)
    assert "error: " in nodes.text("B") and "store" in nodes.text("B")
    nodes.end()
    resumes(config, tmp_path / "run", capsys)
