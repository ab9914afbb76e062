"""parallel.tp_comm_overlap: what it must have, and what its layers need of the machine."""

from __future__ import annotations

import copy

import pytest
from test_config import GOOD

from megatron_prefix.config import ModelConfig, ParallelConfig, parse_config
from megatron_prefix.config.parts import Architecture
from megatron_prefix.errors import InputError
from megatron_prefix.estimate import plan_run
from megatron_prefix.model import overlap, transformer_config
from megatron_prefix.model.overlap import overlap_settings
from megatron_prefix.testing import write_random_set

FITTING = {
    "data": {"pad_rows": "capacity"},
    "model": {"dtype": "bfloat16"},
    "parallel": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "tp_comm_overlap": True,
    },
}


def parsed(**sections):
    raw = copy.deepcopy(GOOD)
    for name in {*FITTING, *sections}:
        own = raw.get(name, {}) | FITTING.get(name, {}) | sections.get(name, {})
        raw[name] = {key: value for key, value in own.items() if value is not None}
    return parse_config(raw)


def test_rows_of_one_length_are_accepted():
    assert parsed().parallel.tp_comm_overlap
    assert parsed(model={"fp8": "hybrid", "first_last_layers_bf16": True, "num_layers": 4})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"sequence_parallel": None}}, "set parallel.sequence_parallel: true and"),
        ({"data": {"pad_rows": None}}, "data.pad_rows: multiple.*set data.packing: true and"),
        ({"model": {"dtype": None}}, "model.dtype: float32: set model.dtype: bfloat16"),
        (
            {"model": {"fp8": "hybrid", "fp8_recipe": "blockwise"}},
            "fp8_recipe: blockwise: Transformer Engine overlaps delayed and tensorwise only",
        ),
        ({"lora": {"r": 4}}, "with a lora section.*train without adapters"),
        (
            {"train": {"generate": {"prompts": "p.jsonl", "every": 1}}},
            "train.generate, whose rows grow",
        ),
        ({"model": {"num_moe_experts": 2}}, "num_moe_experts = 2: each rank's experts get another"),
    ],
)
def test_what_it_does_not_go_with_is_refused(sections, message):
    with pytest.raises(InputError, match=f"parallel.tp_comm_overlap = True.*{message}"):
        parsed(**sections)


def test_layers_that_are_not_transformer_engines_are_refused(monkeypatch):
    parallel = ParallelConfig(**FITTING["parallel"])
    with pytest.raises(InputError, match="tp_comm_overlap = True needs CUDA and Transformer"):
        overlap_settings(parallel, Architecture())
    sizes = {key: GOOD["model"][key] for key in GOOD["model"]}
    with pytest.raises(InputError, match="tp_comm_overlap = True needs CUDA and Transformer"):
        transformer_config(ModelConfig(**sizes), vocab_size=64, seed=1, parallel=parallel)
    monkeypatch.setattr(overlap, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(overlap, "uses_transformer_engine", lambda parts: parts.is_plain)
    with pytest.raises(InputError, match="this model has parts that Transformer Engine's"):
        overlap_settings(parallel, Architecture(activation="relu"))
    assert overlap_settings(parallel, Architecture()) == {"tp_comm_overlap": True}
    assert overlap_settings(ParallelConfig(), Architecture(activation="relu")) == {}


def test_plan_counts_the_buffers(tmp_path):
    data = {"train": write_random_set(tmp_path / "set", 2, 8), "row_capacity": 256}
    stage = {}
    for is_on in (False, True):
        config = parsed(data=data, parallel={"tp_comm_overlap": is_on})
        memory = plan_run(config, world_size=2)["memory"]
        stage[is_on] = memory["stages"][memory["fullest_stage"]]
    # 12 buffers of 256 tokens of 64 channels in bfloat16
    assert stage[True]["user_buffers"] == 12 * 256 * 64 * 2
    assert stage[True]["total"] - stage[False]["total"] == stage[True]["user_buffers"]
