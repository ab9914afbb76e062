"""One training run on the GPU, step by step beside the same run on CPU in float32."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from budget import needs_cuda, skip_without
from torch import bfloat16

from megatron_prefix.testing import write_random_set

pytestmark = needs_cuda

STEPS = 12
TOLERANCES = {
    "float32": {"loss": 1e-5, "grad_norm": 1e-4, "rewards/margins": 1e-3},
    "bfloat16": {"loss": 3e-3, "grad_norm": 3e-2, "rewards/margins": 1e-2},
}
"""Largest difference over max(1, |CPU's value|). float32's is the accumulation order of other
kernels. bfloat16's are some forty times what bfloat16 on CPU has been seen to differ by."""


def trained(directory, train, name, on_cuda, **model):
    """Run the command as a user would, on the device that it finds; return its lines."""
    config = {
        "data": {"train": train, "row_capacity": 2048, "global_batch_size": 16},
        "model": {
            "num_layers": 3,
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            **model,
        },
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 3},
        "train": {"steps": STEPS},
        "logging": {"output": str(directory / name)},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = dict(os.environ) if on_cuda else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "megatron_prefix", "train", "--config", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (directory / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_alike(run, reference, tolerances):
    assert len(run) == len(reference) == STEPS
    for ours, theirs in zip(run, reference, strict=True):
        for key, tolerance in tolerances.items():
            error = abs(ours[key] - theirs[key]) / max(1.0, abs(theirs[key]))
            assert error <= tolerance, f"step {ours['step']}, {key}: {ours[key]} {theirs[key]}"


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    directory = tmp_path_factory.mktemp("curve")
    train = write_random_set(directory / "train", seed=5, num_groups=64)
    lines = trained(directory, train, "cpu", on_cuda=False)
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"], "the run has to learn something"
    return directory, train, lines


def test_float32_follows_cpu(on_cpu):
    directory, train, reference = on_cpu
    run = trained(directory, train, "float32", on_cuda=True)
    assert_alike(run, reference, TOLERANCES["float32"])


@pytest.mark.parametrize("backend", ["flash", "te", "flex"])
def test_bfloat16_follows_cpu(on_cpu, backend):
    skip_without(backend, bfloat16, 64)
    directory, train, reference = on_cpu
    model = {"dtype": "bfloat16", "attention_backend": backend}
    run = trained(directory, train, backend, on_cuda=True, **model)
    assert_alike(run, reference, TOLERANCES["bfloat16"])
