"""What the benchmark of whole steps counts, and what it prints of modes that did not fit."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools"))
import bench_training  # noqa: E402
from bench_common import NOT_RUN  # noqa: E402

from megatron_prefix.config import parse_config  # noqa: E402
from megatron_prefix.estimate.flops import ForwardFlops  # noqa: E402


@pytest.fixture
def config():
    return parse_config(
        {
            "data": {"train": "none", "row_capacity": 1, "global_batch_size": 1},
            "model": {
                "num_layers": 2,
                "hidden_size": 8,
                "ffn_hidden_size": 8,
                "num_attention_heads": 2,
            },
            "optimizer": {"lr": 1e-5},
            "train": {"steps": 1},
            "logging": {"output": "none"},
        }
    )


def test_flops_of_a_step(config):
    rows = [ForwardFlops(linear=10.0, attention=2.0, head=3.0), ForwardFlops(head=1.0)]
    assert bench_training.step_flops(rows, 0.0, config) == 4 * 16.0
    assert bench_training.step_flops(rows, 3.0, config) == 4 * 16.0 + 3.0
    full = replace(config, model=replace(config.model, recompute_granularity="full",
                   recompute_method="uniform", recompute_num_layers=1))  # fmt: skip
    assert bench_training.step_flops(rows, 0.0, full) == 4 * 16.0 + 12.0
    known = replace(config, loss=replace(config.loss, reference="precomputed"))
    assert bench_training.step_flops(rows, 0.0, known) == 3 * 16.0


def measured(seconds):
    parts = ForwardFlops(linear=1.0, attention=1.0, head=2.0)
    return bench_training.Measured(
        wall=seconds, processor=seconds, flops=[4.0] * len(seconds), parts=parts, tokens=1, saved=1
    )


def test_a_mode_that_runs_out_of_memory_has_a_row_that_says_so():
    known = bench_training.COMPARED[1]
    modes = ["packed, unshared", "packed, shared", *known]
    outcomes = {"packed, shared": measured([1.0]), **{mode: measured([2.0]) for mode in known}}
    rows = bench_training.mode_rows("set", modes, outcomes)
    assert [row["mode"] for row in rows] == modes
    assert rows[0]["note"] == NOT_RUN and "reached" not in rows[0]
    assert rows[2]["pairs/s over the first"] == "0.500"
    assert bench_training.summary("set", 8, outcomes)["time none/tree"] == "1.000"
    assert bench_training.summary("set", 8, {"packed, shared": measured([1.0])})["note"] == NOT_RUN
    assert all(row["note"] == NOT_RUN for row in bench_training.mode_rows("set", modes, {}))
