"""Short training runs on tiny models, and what they leave: shared by the tests of training."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_prefix.checkpoint import save_load as checkpoint
from megatron_prefix.config import Config, ParallelConfig, parse_config
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.distributed.world import join_world
from megatron_prefix.train.pace import MEASURED
from megatron_prefix.train.run import train
from megatron_prefix.train.setup import prepare_trainer
from megatron_prefix.train.trainer import Trainer

TINY = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}


def configure(output: Path, dataset: str, **sections: Mapping) -> Config:
    """A run of six steps of four groups at a learning rate of 1e-3; `sections` go on top."""
    defaults = {
        "data": {"train": dataset, "global_batch_size": 4, "row_capacity": 8192},
        "model": {**TINY, "num_query_groups": 2},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 6},
        "logging": {"output": str(output)},
        "loss": {},
    }
    assert sections.keys() <= {*defaults, "lora", "parallel"}
    defaults |= {name: {} for name in sections if name not in defaults}
    return parse_config(
        {name: {**keys, **sections.get(name, {})} for name, keys in defaults.items()}
    )


def lines(output: Path) -> list[dict]:
    """All lines of a run's metrics file; every one has to be whole."""
    text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    """The lines without what a clock wrote."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def trained(config: Config) -> list[dict]:
    """Train, and return the run's lines."""
    train(config)
    return lines(Path(config.logging.output))


def assert_same_runs(
    result: tuple[list[dict], dict[str, torch.Tensor]],
    expected: tuple[list[dict], dict[str, torch.Tensor]],
    skipped: Collection[str],
    close: Mapping[str, Mapping[str, float]],
    *,
    has_same_keys: bool = True,
) -> None:
    """Every metric of every line, the evaluations' too, and the weights.

    `close` has the tolerances of pytest.approx for the metrics that have their own. With
    `has_same_keys` the lines also have the same `skipped` metrics.
    """
    for a, b in zip(result[0], expected[0], strict=True):
        left_out = set() if has_same_keys else set(skipped)
        assert a.keys() - left_out == b.keys() - left_out
        for key in b.keys() - set(skipped):
            near = pytest.approx(b[key], **close.get(key, {"rel": 1e-4, "abs": 1e-5}))
            assert a[key] == near, (a["step"], key)
    assert result[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        assert (result[1][name] - weight).abs().max() <= 1e-4, name


def prepare(config: Config, world) -> Trainer:
    """A run before its first step, for tests that change a part of it."""
    dataset = own_responses(PreferenceDataset(config.data.train))
    return prepare_trainer(config, dataset, None, world)


def saved_state(root: str | Path, step: int) -> tuple[dict[str, torch.Tensor], dict]:
    """A whole checkpoint: its tensors by name, and what is saved beside them."""
    path = str(checkpoint.iteration_dir(root, step))
    with join_world(ParallelConfig(), seed=0):
        tensors = dist_checkpointing.load_plain_tensors(path)
        common = dist_checkpointing.load_common_state_dict(path)
    return {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}, common


def saved_weights(root: str | Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, by name."""
    tensors, _ = saved_state(root, step)
    return {name: x for name, x in tensors.items() if not name.startswith("optimizer.")}
