"""Every set goes the whole way: build, inspect --verify, a training step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from toy import make_toy

from megatron_prefix.__main__ import main
from megatron_prefix.config import parse_config
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.train.run import train

SETS = {"hh_pairs": 1800, "chat_pairs": 225, "oasst_trees": 75}


def first_step(prefix: str, output: Path) -> dict:
    """Train one step of a tiny model and return its line."""
    sizes = dict(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2)
    train(
        parse_config(
            {
                "data": {"train": prefix, "row_capacity": 32768, "global_batch_size": 2},
                "model": sizes,
                "optimizer": {"lr": 1e-3},
                "train": {"steps": 1},
                "logging": {"output": str(output)},
            }
        )
    )
    return json.loads((output / "metrics.jsonl").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SETS)
def test_real_set(name, data_dir, tmp_path, capsys):
    prefix = str(tmp_path / name)
    source = ["--input", str(data_dir / f"{name}.jsonl.gz"), "--tokenizer", "bytes"]
    limits = ["--max-length", "16384", "--overflow", "drop"]
    assert main(["build", *source, "--output", prefix, *limits]) == 0
    assert main(["inspect", prefix, "--verify"]) == 0
    dataset = PreferenceDataset(prefix)
    assert dataset.manifest["counts"]["groups"] == SETS[name]
    assert "Human:" not in capsys.readouterr().out, "no text of the set is printed"
    row = first_step(prefix, tmp_path / "run")
    assert abs(row["loss"] - math.log(2)) < 1e-5
    assert row["tokens/executed"] < row["tokens/logical"]


def test_toy_set(tmp_path):
    prefix = make_toy(tmp_path)
    assert main(["inspect", prefix, "--verify"]) == 0
    row = first_step(prefix, tmp_path / "run")
    assert abs(row["loss"] - math.log(2)) < 1e-5
