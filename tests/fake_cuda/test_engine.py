"""Whole steps with Transformer Engine's layers, on fake tensors: its own Python, no C++.

Its Python chooses kernels and passes arguments; engine_shapes.py checks them and gives shapes.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OVERLAP = {
    "parallel": TP2SP | {"tp_comm_overlap": True},
    "data": {"pad_rows": "capacity", "row_capacity": 250, "global_batch_size": 8},
}
CASES = {  # name: processes, sections
    "flash": (1, {}),
    "te": (1, {"model": {"attention_backend": "te"}}),
    "te, window": (1, {"model": {"attention_backend": "te", "window_size": [7, 0]}}),
    "lora": (1, {"lora": {"r": 4, "target_modules": "all-linear"}}),
    "tp2sp": (2, {"parallel": TP2SP, "model": {"attention_backend": "te"}}),
    "reward": (1, {"model": {"kind": "reward"}}),
    "fp8 tensorwise": (
        1,
        {"model": {"fp8": "hybrid", "first_last_layers_bf16": True, "num_layers": 3}},
    ),
    "fp8 delayed": (1, {"model": {"fp8": "hybrid", "fp8_recipe": "delayed"}}),
    "fp8 blockwise": (1, {"model": {"fp8": "e4m3", "fp8_recipe": "blockwise"}}),
    "fp8 lora tp2sp": (
        2,
        {
            "model": {"fp8": "hybrid"},
            "parallel": TP2SP,
            "lora": {"r": 16, "target_modules": "all-linear"},
        },
    ),
}
BUFFERS = {  # name: sections besides, and the dtypes of buffers
    "bfloat16": ({}, {"torch.bfloat16": 12}),
    "bfloat16, recomputed": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"torch.bfloat16": 12},
    ),
    "fp8": ({"fp8": "hybrid"}, {"torch.bfloat16": 4, "torch.uint8": 8}),
    "fp8 but ends": (
        {"fp8": "hybrid", "first_last_layers_bf16": True, "num_layers": 3},
        {"torch.bfloat16": 16, "torch.uint8": 8},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUFFERS)
def test_communication_that_is_overlapped_has_buffers_of_every_row(steps, name):
    model, dtypes = BUFFERS[name]
    result = steps(2, OVERLAP | {"model": {"attention_backend": "te"} | model}, has_engine=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    length = 256 if "fp8" in model else 250
    assert {tuple(shape) for shape, _ in report["buffers"]} == {(length, 256)}
    assert Counter(dtype for _, dtype in report["buffers"]) == dtypes
    assert report["buffers_used"]["fill"] > 8 and report["buffers_used"]["read"] > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_steps_with_its_layers(steps, name):
    size, sections = CASES[name]
    result = steps(size, sections, has_engine=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["launched"]["passes"] > 100 and report["launched"]["update"] > 10
    assert report["waits"].get("feed", {}) == {}
    waits = report["waits"].get("passes", {})
    own = {place for place in waits if "megatron_prefix/" in place}
    assert own == set(), waits
    if not name.endswith(
        "tp2sp"
    ):  # the mask of the divided embedding; else what is made at first use
        assert all(count == 1 for count in waits.values()), waits
