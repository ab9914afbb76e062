"""data.pad_rows: rows that all have the capacity give the same run, and plan counts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import assert_same_runs, configure, prepare, saved_weights, trained

from megatron_prefix.config import parse_config
from megatron_prefix.data.steps.alone import AloneSteps
from megatron_prefix.data.steps.collate import collate_packed
from megatron_prefix.distributed.world import join_world
from megatron_prefix.errors import InputError
from megatron_prefix.estimate import plan_run
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.pace import MEASURED

CAPACITY = 203
MODELS = {
    "dense": {},
    "experts": {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_random_set(tmp_path_factory.mktemp("pad") / "set", 3, 12)


def run(folder: Path, data: str, pad_rows: str, model: dict) -> tuple:
    config = configure(
        folder,
        data,
        data={"row_capacity": CAPACITY, "pad_rows": pad_rows, "valid": data},
        model=model,
        train={"steps": 4, "save": str(folder / "checkpoint")},
    )
    return trained(config), saved_weights(folder / "checkpoint", 4)


@pytest.mark.parametrize("model", MODELS)
def test_padding_to_the_capacity_changes_nothing(tmp_path, data, model):
    short = run(tmp_path / "multiple", data, "multiple", MODELS[model])
    full = run(tmp_path / "capacity", data, "capacity", MODELS[model])
    assert_same_runs(full, short, (*MEASURED, "tokens/executed"), {})
    executed = [
        (a["tokens/executed"], b["tokens/executed"])
        for a, b in zip(full[0], short[0], strict=True)
        if "tokens/executed" in a
    ]
    assert all(a % CAPACITY == 0 and a > b for a, b in executed)


def test_every_row_has_the_capacity_rounded_up(tmp_path, data):
    config = configure(tmp_path, data, data={"row_capacity": CAPACITY, "pad_rows": "capacity"})
    with join_world(config.parallel, seed=0) as world:
        sampler = prepare(config, world).sampler
    sampler = replace(sampler, row_multiple=4)
    rows = sampler.micro_batches(sampler.step(0))
    assert {len(row.tokens) for row in rows} == {204}
    alone = AloneSteps(sampler=sampler)
    assert {len(row.tokens) for row in alone.micro_batches(alone.step(0))} == {204}


def test_padding_is_cut_into_short_trees():
    row = collate_packed([], 300)
    assert row.layout.num_tokens == 300 and row.num_tokens == 0
    assert np.bincount(row.layout.position_ids()).max() == 3  # trees of 128, 128 and 44
    assert row.layout.longest_path == 128


def test_plan_counts_the_padding(tmp_path, data):
    tokens = {}
    for pad_rows in ("multiple", "capacity"):
        config = configure(tmp_path, data, data={"row_capacity": 203, "pad_rows": pad_rows})
        plan = plan_run(config)["data"]
        tokens[pad_rows] = plan["executed_tokens_per_step"]
        assert plan["longest_row"] <= 203
    assert tokens["capacity"] > tokens["multiple"]
    assert tokens["capacity"] * plan["steps_read"] % 203 == 0


def test_capacity_is_refused_without_packing():
    data = {"train": "x", "packing": False, "micro_batch_size": 2, "global_batch_size": 1}
    raw = {"data": data | {"pad_rows": "capacity"}, "model": {"hf": "y"}, "optimizer": {"lr": 1.0}}
    with pytest.raises(InputError, match="pad_rows = capacity is for packed rows"):
        parse_config(raw | {"train": {"steps": 1}, "logging": {"output": "z"}})
