"""Runs of tests in one folder, on one process or several, and their comparison."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from processes import on_ranks

from megatron_prefix.__main__ import main
from megatron_prefix.testing import free_port, write_random_set

TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-5, "rewards/margins": 1e-3}
"""Relative, the denominator at least 1e-2; weights differ by at most 1e-4."""
NUM_GROUPS, BATCH, NUM_STEPS, CUT = 17, 4, 5, 2
TIMEOUT_S = 240


def called(commands: list[tuple[list[str], int]]) -> int:
    """Call the program once for each list of arguments, each with a store at its own port.

    For a process of its own, in which stages of a pipeline must not exchange shapes."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def refuse(*_: object) -> None:
        raise AssertionError("stages know the shapes of their rows, see engine/pipeline.py")

    setattr(P2PCommunicator, "_communicate_shapes", refuse)  # noqa: B010
    for argv, port in commands:
        os.environ["MASTER_PORT"] = str(port)
        if code := main(argv):
            return code
    return 0


def on_processes(count: int, folder: Path, commands: list[list[str]], timeout_s: int) -> None:
    """Run the commands one after another on `count` processes; on one, in this process."""
    if count == 1:
        for argv in commands:
            assert main(argv) == 0, argv
        return
    with_ports = [(argv, free_port()) for argv in commands]
    on_ranks(count, partial(called, with_ports), folder, timeout_s)


class Runs:
    """A folder of runs by name, each with its config.yaml, metrics and checkpoints."""

    def __init__(self, folder: Path, data: str | None = None, row_capacity: int = 120) -> None:
        self.folder, self.row_capacity = folder, row_capacity
        self.data = data or write_random_set(folder / "train", 0, NUM_GROUPS)
        self.valid = write_random_set(folder / "valid", 1, 5)

    def output(self, name: str) -> Path:
        return self.folder / "runs" / name

    def config(self, name: str, **sections) -> str:
        """Write the run's configuration and return its path."""
        output = self.output(name)
        saved = str(output / "saved")
        settings = {
            "data": {"train": self.data, "valid": self.valid, "row_capacity": self.row_capacity}
            | {"global_batch_size": BATCH, "seed": 3},
            "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48}
            | {"num_attention_heads": 4, "num_query_groups": 2, "init_method_std": 0.1},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
            "train": {"epochs": 1, "save": saved, "load": saved}
            | {"save_interval": CUT, "eval_interval": CUT},
            "logging": {"output": str(output)},
            **sections,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(settings))
        return str(path)

    def train(self, name: str, **sections) -> list[str]:
        return ["train", "--config", self.config(name, **sections)]

    def cut(self, source: str, name: str, step: int = CUT) -> None:
        """What `source` had left if it had been killed after its checkpoint of `step`."""
        shutil.copytree(self.output(source), self.output(name))
        saved = self.output(name) / "saved"
        for later in range(step + 1, NUM_STEPS + 1):
            shutil.rmtree(saved / f"iter_{later:07d}", ignore_errors=True)
        (saved / "latest_checkpointed_iteration.txt").write_text(str(step))

    def lines(self, name: str) -> list[dict]:
        text = (self.output(name) / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def weights(self, name: str, step: int = NUM_STEPS) -> dict[str, torch.Tensor]:
        from megatron.core import dist_checkpointing

        from megatron_prefix.config import ParallelConfig
        from megatron_prefix.distributed.world import join_world

        path = self.output(name) / "saved" / f"iter_{step:07d}"
        with join_world(ParallelConfig(), seed=0):
            tensors = dist_checkpointing.load_plain_tensors(str(path))
        parameters = {k: x for k, x in tensors.items() if isinstance(x, torch.Tensor)}
        return {k: x for k, x in parameters.items() if not k.startswith("optimizer.")}


def assert_same_history(history: list[dict], expected: list[dict]) -> float:
    """Returns the largest difference as a share of its tolerance."""
    assert [row["step"] for row in history] == [row["step"] for row in expected]
    assert sum("loss" in row for row in expected) == NUM_STEPS
    largest = 0.0
    for ours, theirs in zip(history, expected, strict=True):
        prefix = "" if "loss" in theirs else "eval_"
        for key, tolerance in TOLERANCES.items():
            if prefix + key in theirs:
                a, b = ours[prefix + key], theirs[prefix + key]
                share = abs(a - b) / (tolerance * max(abs(b), 1e-2))
                assert share <= 1, (theirs["step"], key, a, b)
                largest = max(largest, share)
    return largest


def assert_same_weights(
    runs: Runs,
    name: str,
    follows: str,
    step: int = NUM_STEPS,
    compared: Callable[[str, torch.Tensor], torch.Tensor] = lambda key, x: x,
) -> None:
    """`compared` gives the entries of a parameter that must be the same."""
    ours, theirs = runs.weights(name, step), runs.weights(follows, step)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        rows = min(len(ours[key]), len(expected))  # the vocabulary's padding depends on the layout
        difference = compared(key, ours[key][:rows] - expected[:rows])
        assert difference.abs().max() <= 1e-4, key
