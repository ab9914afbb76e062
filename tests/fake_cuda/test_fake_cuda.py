"""Whole training steps as CUDA runs them, without a GPU: shapes, dtypes, devices, host waits.

Every case is a process of its own (fake_run.py). In the feed and in forward and backward the host
must not wait for the device; a new wait fails with file and line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prefix.testing import write_random_set

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("cc")
REASON = "needs a build of torch with CUDA, a C compiler, Linux, and no GPU"
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None
    or COMPILER is None
    or sys.platform != "linux"
    or torch.cuda.is_available(),
    reason=REASON,
)
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 4096}
LONGROPE |= {"short_factor": [1.5] * 32, "long_factor": [2.0] * 32}
CASES = {  # name: processes, sections
    "lm": (1, {}),
    "reward": (1, {"model": {"kind": "reward"}}),
    "lora": (1, {"lora": {"r": 4, "target_modules": "all-linear"}}),
    "recompute": (1, {"model": FULL}),
    "longrope": (1, {"model": {"rope_scaling": LONGROPE}}),
    "chunked head": (1, {"model": {"lm_head_chunk_size": 16}}),
    "tp2sp": (2, {"parallel": TP2SP}),
    "pp2": (2, {"parallel": PP2}),
    "vpp2": (
        2,
        {
            "parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2},
            "model": {"num_layers": 4},
        },
    ),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}}),
    "dp4": (4, {"parallel": {**ZERO, "overlap_param_gather": True}}),
}
QUICK = "lm"
STOCK = "megatron/core/tensor_parallel/layers.py", "megatron/core/pipeline_parallel/schedules.py"
"""Where Megatron-Core masks the embedding of a part of the vocabulary, forward and in backward."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(HERE / "driver.c")], check=True)
    return library


@pytest.fixture
def steps(driver, tmp_path):
    """`steps(processes, sections, *plant)`: the finished process."""

    def steps(size: int, sections: dict, *plant: str) -> subprocess.CompletedProcess:
        data = write_random_set(tmp_path / "set", 5, 16)
        settings = {
            "data": {"train": data, "row_capacity": 256, "global_batch_size": 8},
            "model": {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512}
            | {"num_attention_heads": 4, "num_query_groups": 2, "dtype": "bfloat16"}
            | {"attention_backend": "flash"}
            | sections.get("model", {}),
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 2},
            "logging": {"output": str(tmp_path / "run")},
        }
        settings |= {key: value for key, value in sections.items() if key != "model"}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
        command = [sys.executable, str(HERE / "fake_run.py"), str(path), str(size), *plant]
        return subprocess.run(
            command,
            env=os.environ | {"LD_PRELOAD": str(driver), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return steps


def params() -> list:
    return [x if x == QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES]


@pytest.mark.parametrize("name", params())
def test_the_host_waits_for_nothing_in_forward_and_backward(steps, name):
    size, sections = CASES[name]
    result = steps(size, sections)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    waits, launched = report["waits"], report["launched"]
    assert launched["passes"] > 100
    own = [x for x in waits.get("passes", {}) if not x.split(": ")[1].startswith(STOCK)]
    assert own == [] and waits.get("feed", {}) == {}, waits
    if name != "tp2sp":
        assert waits.get("passes", {}) == {}
    if not name.endswith("pp2"):  # where rank 0 has the whole step
        assert launched["update"] > 10
        places = {x.split(": ")[1].rpartition(":")[0] for x in waits["update"]}
        assert places == {"megatron_prefix/engine/norm.py"}
        places = {x.split(": ")[1].rpartition(":")[0] for x in waits["totals"]}
        assert places == {"megatron_prefix/train/totals.py"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["item", "cpu", "float32"])
def test_planted_faults_are_detected(steps, fault):
    result = steps(1, {}, fault)
    if fault == "item":
        waits = json.loads(result.stdout.splitlines()[-1])["waits"]
        assert any(x.startswith("item: ") for x in waits["passes"])
    else:
        assert result.returncode != 0
        expected = "on the same device" if fault == "cpu" else "dtype"
        assert expected in result.stderr, result.stderr[-2000:]
