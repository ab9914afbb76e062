"""Twenty kills and twenty cut links of a run with two nodes and four processes.

After each, the same command goes on; at the end the history is that of a run without faults.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from commands import lines, write_config
from nodes import ADDRESSES, Nodes, needs_namespaces, network_of_two, num_lines, wait_for_end

FAULTS = 20
STEPS = 200
TIMEOUT_S = 15
"""parallel.distributed_timeout_minutes."""
END_S = TIMEOUT_S + 10 + 30
"""Until every rank has to be gone: the timeout, the last deadline, a machine under load."""

pytestmark = [pytest.mark.slow, needs_namespaces, pytest.mark.timeout(3600)]


def two_node_config(folder: Path, dataset: str) -> str:
    folder.mkdir(exist_ok=True)
    return write_config(
        folder / "run.yaml",
        dataset,
        folder / "run",
        data={"global_batch_size": 4},
        parallel={"distributed_timeout_minutes": TIMEOUT_S / 60, "use_distributed_optimizer": True},
        optimizer={"lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_steps": 2},
        train={"steps": STEPS, "save_interval": 2},
    )


def finish(config: str, folder: Path) -> None:
    with network_of_two() as network:
        nodes = Nodes(network, config, folder, ranks=2)
        assert nodes.wait(600) == [0, 0], nodes.texts()


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory) -> list[dict]:
    """History of a run without faults."""
    folder = tmp_path_factory.mktemp("straight")
    finish(two_node_config(folder, dataset), folder)
    return lines(folder / "run")


@pytest.mark.parametrize("fault", ["kill", "cut"])
def test_twenty_faults_at_random_moments_change_nothing(dataset, expected, tmp_path, fault):
    """A node's processes are killed, or its link is cut until everything has ended."""
    config, output = two_node_config(tmp_path, dataset), tmp_path / "run"
    rng = random.Random(f"{fault} 20")
    for number in range(FAULTS):
        with network_of_two() as network:
            nodes = Nodes(network, config, tmp_path, ranks=2)
            try:
                nodes.wait_for_lines(output, num_lines(output) + rng.randrange(1, 4))
                time.sleep(rng.uniform(0, 0.3))
                assert nodes.is_running(), f"{fault} {number}: ended early: {nodes.texts()}"
                workers = nodes.all_workers()
                node = rng.choice(list(ADDRESSES))
                if fault == "kill":
                    nodes.kill(node)
                else:
                    network.switch(node, "down")
                wait_for_end(workers, END_S)
            finally:
                nodes.end()
    finish(config, tmp_path)
    assert lines(output) == expected
