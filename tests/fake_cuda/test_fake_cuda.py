"""Whole training steps as CUDA runs them, without a GPU: shapes, dtypes, devices, host waits.

With a build of torch without CUDA, the feed and one forward pass. Every case is a process of its
own (fake_run.py). In the feed and in forward and backward the host must not wait for the device; a
new wait fails with file and line.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

HAS_CUDA_BUILD = torch.version.cuda is not None
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
FUSED = {"apply_rope_fusion", "bias_swiglu_fusion", "cross_entropy_loss_fusion", "key_sum_fusion"}
FUSED = dict.fromkeys(FUSED, True)
CASES |= {
    "fused": (1, {"model": FUSED}),
    "windows and sinks": (
        1,
        {"model": {"window_size": [7, 0], "softmax_type": "learnable", "key_sum_fusion": True}},
    ),
}
KERNELS = {"rotary_kernel", "segments_kernel", "gate_kernel", "gate_gradient_kernel"}
KERNELS |= {"statistics_kernel", "gradient_kernel"}
QUICK = "lm"
STOCK = "megatron/core/tensor_parallel/layers.py", "megatron/core/pipeline_parallel/schedules.py"
"""Where Megatron-Core masks the embedding of a part of the vocabulary, forward and in backward."""


def params() -> list:
    return [x if x == QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CASES]


@pytest.mark.parametrize("name", params())
def test_the_host_waits_for_nothing_in_forward_and_backward(steps, name):
    if name == "fused" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: pip install triton")
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
    if name == "fused" and HAS_CUDA_BUILD:
        assert set(report["kernels"]) == KERNELS
    if HAS_CUDA_BUILD and not name.endswith("pp2"):  # where rank 0 has the whole step
        assert launched["update"] > 10
        places = {x.split(": ")[1].rpartition(":")[0] for x in waits["update"]}
        assert places == {"megatron_prefix/engine/norm.py"}
        places = {x.split(": ")[1].rpartition(":")[0] for x in waits["totals"]}
        assert places == {"megatron_prefix/train/totals.py"}


FAULTS = {  # what is planted -> the message
    "cpu": "on the same device",
    "float32": "dtype",
    "order": "order?",
    "order in backward": "order?",
    "strides": "the last dimension of key is not contiguous",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_detected(steps, fault):
    if fault.endswith("backward") and not HAS_CUDA_BUILD:
        pytest.skip("needs a build of torch with CUDA for backward")
    result = steps(1, {}, fault)
    assert result.returncode != 0
    assert FAULTS[fault] in result.stderr, result.stderr[-2000:]


@pytest.mark.slow
def test_a_planted_wait_of_the_host_is_detected(steps):
    result = steps(1, {}, "item")
    waits = json.loads(result.stdout.splitlines()[-1])["waits"]
    assert any(x.startswith("item: ") for x in waits["passes"])
