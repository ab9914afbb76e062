"""Two processes follow the trajectory of one: plain and distributed optimizer.

All runs of two processes go through one `torchrun`, which calls the program once a run. The data
are conversations of several turns; row capacity cuts a step into several rows, and the last step
has a single group, so that one of the two processes has nothing but an empty row there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prefix.__main__ import main
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.testing import free_port, write_random_set

TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-5, "rewards/margins": 1e-3}
"""Relative, the denominator at least 1e-2; weights differ by at most 1e-4."""
NUM_GROUPS, BATCH, NUM_STEPS, CUT = 17, 4, 5, 2
TIMEOUT_S = 240
SEVERAL = """
import json, os, sys
from megatron_prefix.__main__ import main
for argv, port in json.loads(sys.argv[1]):
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    code = main(argv)
    if code:
        sys.exit(code)
"""
"""Calls the program once for each list of arguments, each with a store of its own."""


def two_processes(folder: Path, *commands: list[str]) -> None:
    """Run the commands one after another on two processes that torchrun starts."""
    script = folder / "several.py"
    script.write_text(SEVERAL)
    given = json.dumps([(argv, free_port()) for argv in commands])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, f"--master-port={free_port()}", str(script), given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
        """What `source` had left if it had been killed behind its checkpoint of `step`."""
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
        from megatron_prefix.train.parallel import world

        path = self.output(name) / "saved" / f"iter_{step:07d}"
        with world(ParallelConfig(), seed=0):
            tensors = dist_checkpointing.load_plain_tensors(str(path))
        found = {k: x for k, x in tensors.items() if isinstance(x, torch.Tensor)}
        return {k: x for k, x in found.items() if not k.startswith("optimizer.")}


ZERO = {"parallel": {"use_distributed_optimizer": True}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """One-process runs here, then all two-process runs by one torchrun."""
    runs = Runs(tmp_path_factory.mktemp("data_parallel"))
    ref = str(runs.folder / "ref-1")
    known = {"loss": {"reference": "precomputed", "ref_logps": ref}}
    assert main(runs.train("one")) == 0
    assert main(runs.train("one zero", **ZERO)) == 0
    assert main(["score", "--config", runs.config("score"), "--output", ref]) == 0
    runs.cut("one zero", "zero 1 to 2")
    runs.cut("one", "plain 1 to 2")
    two_processes(
        runs.folder,
        runs.train("plain"),
        runs.train("zero", **ZERO),
        runs.train("precomputed", **ZERO, **known),
        runs.train("zero 1 to 2", **ZERO),
        runs.train("plain 1 to 2"),
        ["score", "--config", runs.config("score"), "--output", str(runs.folder / "ref-2")],
    )
    runs.cut("zero", "zero 2 to 1")
    runs.cut("plain", "plain 2 to 1")
    assert main(runs.train("zero 2 to 1", **ZERO)) == 0
    assert main(runs.train("plain 2 to 1")) == 0
    return runs


NAMES = ["plain", "zero", "precomputed"]
RESUMED = ["plain 1 to 2", "zero 1 to 2", "plain 2 to 1", "zero 2 to 1"]


def assert_same_lines(found: list[dict], expected: list[dict]) -> None:
    """The same steps and keys, values within TOLERANCES, counts exactly."""
    assert [(r["step"], *r) for r in found] == [(r["step"], *r) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            tolerance = TOLERANCES.get(key.removeprefix("eval_"))
            if tolerance is not None:
                error = abs(ours[key] - value) / max(abs(value), 1e-2)
                assert error <= tolerance, (theirs["step"], key, ours[key], value)
            elif key in ("num_pairs", "tokens/logical", "tokens/targets", "rows/projected"):
                assert ours[key] == value, (theirs["step"], key)


@pytest.mark.parametrize("name", NAMES + RESUMED)
def test_two_processes_follow_one(runs, name):
    expected = runs.lines("one")
    assert [r["step"] for r in expected] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert_same_lines(runs.lines(name), expected)


@pytest.mark.parametrize("name", NAMES + RESUMED)
def test_two_processes_end_at_the_same_weights(runs, name):
    found, expected = runs.weights(name), runs.weights("one")
    assert found.keys() == expected.keys()
    worst = max(float((found[k] - x).abs().max()) for k, x in expected.items())
    assert worst <= 1e-4, worst


def test_a_distributed_optimizer_alone_changes_nothing(runs):
    assert_same_lines(runs.lines("one zero"), runs.lines("one"))


def test_the_steps_have_several_rows_and_the_last_one_an_empty_one(runs):
    """What the comparison above is about: else it would prove little."""
    dataset = PreferenceDataset(runs.data)
    sizes = [dataset.group_num_tokens(g) for g in range(NUM_GROUPS)]
    assert min(sum(sizes[i : i + BATCH]) for i in range(NUM_GROUPS - BATCH)) > 120
    first, *_, last = [r for r in runs.lines("plain") if "loss" in r]
    one = [r for r in runs.lines("one") if "loss" in r]
    assert last["tokens/logical"] < first["tokens/logical"]
    assert last["tokens/executed"] > one[-1]["tokens/executed"], "no empty row"


def test_a_sidecar_is_the_same_from_two_processes(runs):
    """To rounding: rows are cut differently."""
    from safetensors.numpy import load_file

    first, second = (load_file(runs.folder / f"ref-{n}") for n in (1, 2))
    assert first.keys() == second.keys() and len(first) == 2
    for name, logps in first.items():
        assert np.abs(second[name] - logps).max() <= 1e-4 * max(1, np.abs(logps).max())


def test_metrics_are_written_once(runs):
    """Two processes, one line a step and no run beside it."""
    for name in NAMES + RESUMED:
        assert [p.name for p in runs.output(name).glob("metrics*")] == ["metrics.jsonl"]
