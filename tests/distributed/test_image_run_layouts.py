"""A run on a data set with images goes from layout to layout, and from optimizer to optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_runs import build, make_model, records
from runs import TIMEOUT_S, on_processes

STEPS = (
    ("tensor", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ("data", 2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
    ("pipeline", 2, {"pipeline_model_parallel_size": 2}),
    ("context", 2, {"context_parallel_size": 2}),
)
"""Layouts of two steps each."""


def metrics(output: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "rewards/margins")
    return [tuple(row[key] for key in keys) for row in rows if "loss" in row]


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_a_run_goes_on_in_every_layout(tmp_path, family):
    """Two steps each, every one from the checkpoint of the one before, are the run of one process;
    everything is trained, and the last record's image is no other's."""
    model = make_model(tmp_path / "model", family)
    data = build(model, records(tmp_path / "records"), tmp_path / "data")

    def config(name: str, steps: int, save: str | None, parallel: dict) -> list[str]:
        sections = {
            "data": {"train": data, "global_batch_size": 6, "row_capacity": 300},
            "model": {"hf": str(model), "vision": {"freeze_tower": False}},
            "parallel": parallel,
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant", "weight_decay": 0.05},
            "train": {"steps": steps, "save": save, "load": save},
            "logging": {"output": str(tmp_path / name)},
        }
        path = tmp_path / f"{name}-{steps}.yaml"
        path.write_text(json.dumps(sections))
        return ["train", "--config", str(path)]

    last = 2 * len(STEPS)
    on_processes(1, tmp_path, [config("whole", last, None, {})], TIMEOUT_S)
    saved = str(tmp_path / "saved")
    for number, (_, ranks, parallel) in enumerate(STEPS):
        command = config("parts", 2 * number + 2, saved, parallel)
        on_processes(ranks, tmp_path, [command], TIMEOUT_S)
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert len(parts) == len(whole) == last
    for own, expected in zip(parts, whole, strict=True):
        assert own == pytest.approx(expected, rel=2e-4, abs=1e-6)
