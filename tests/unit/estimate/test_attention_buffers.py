"""The buffers of a call of attention: by hand, and from the trees that a plan reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.estimate.attention import PathShare, attention_buffers
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import write_random_set

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=48,
    dtype="bfloat16",
)
PAIRS = PathShare(pieces=0.02, keys=1.5)
"""Two responses of 50 tokens to a prompt as long have 2 pieces and 200 keys of 150 tokens; here
rows of 100 tokens have 2 pieces and 150 keys."""


def buffers(paths=PAIRS, parallel=None, row_tokens=100, **model):
    config = replace(MODEL, **model)
    layout = ParallelConfig(**parallel or {})
    return attention_buffers(config, config.sizes(), layout, row_tokens, paths)


def test_by_hand():
    gathered = 2 * 150 * 2 * 48 * 2
    gradients = 2 * 150 * 2 * 48 * 2 + 2 * 150 * 4 * 48 * 2  # and expanded to all query heads
    queries = 100 * 4 * 48 * 2
    accumulated = (100 + 2 * 128) * 4 * (64 + 1) * 4  # 48 is computed as 64
    assert buffers() == gathered + gradients + queries + accumulated
    # as many key heads as query heads: nothing is expanded
    alone = 100 * 4 * 48 * 2 + (100 + 256) * 4 * 65 * 4 + 4 * 150 * 4 * 48 * 2
    assert buffers(num_query_groups=4) == alone


def test_without_sharing_nothing_is_gathered():
    chains = PathShare(pieces=0.02, keys=1.0)
    difference = 2 * 2 * 50 * 2 * 48 * 2 + 2 * 50 * 4 * 48 * 2 + 2 * 100 * 2 * 48 * 2
    assert buffers() - buffers(chains) == difference
    one_piece = buffers(PathShare(pieces=0.01, keys=1.0))
    assert buffers(None) == one_piece < buffers(chains)


def test_layouts_divide_heads_and_queries():
    assert buffers(parallel={"tensor_model_parallel_size": 2}) == buffers() / 2
    fewer = 50 * 4 * 48 * 2 + 50 * 4 * 65 * 4
    assert buffers() - buffers(parallel={"context_parallel_size": 2}) == fewer


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, True),
        ({"attention_backend": "flash"}, True),
        ({"attention_backend": "te"}, True),
        ({"attention_backend": "path"}, False),
        ({"dtype": "float32"}, False),
    ],
)
def test_only_kernels_in_16_bits_are_counted(settings, counts):
    assert (buffers(**settings) > 0) is counts


def test_mistral_at_16k_rows_needs_gigabytes():
    """The order of size that made the difference: 2 to 3 GB of a layer."""
    mistral = {"num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128}
    paths = PathShare(pieces=60 / 16384, keys=1.6)
    gigabytes = buffers(paths, row_tokens=16384, hidden_size=4096, **mistral) / 1e9
    assert 0.9 < gigabytes < 3


def test_a_plan_takes_pieces_and_keys_from_its_rows(tmp_path, capsys):
    data = write_random_set(tmp_path / "set", 1, 12)
    path = tmp_path / "config.json"
    settings = {
        "data": {"train": data, "row_capacity": 256, "global_batch_size": 4},
        "model": {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512}
        | {"num_attention_heads": 4, "num_query_groups": 2, "dtype": "bfloat16"},
        "optimizer": {"lr": 1e-3},
        "train": {"epochs": 1},
        "logging": {"output": str(tmp_path / "run")},
    }
    path.write_text(json.dumps(settings))
    assert main(["plan", "--config", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    costs = report["data"]["sharing"]["tree"]
    dataset = PreferenceDataset(data)
    leaves = [int(laid_out(dataset[group]).leaf_mask.sum()) for group in range(12)]
    assert costs["pieces"] * report["data"]["steps_read"] == pytest.approx(sum(leaves))
    assert costs["gathered_keys"] > costs["tokens"] > costs["pieces"]
    alone = report["data"]["sharing"]["none"]
    assert alone["gathered_keys"] == alone["tokens"]
    stage = report["memory"]["stages"][0]
    model = ModelConfig(**settings["model"])
    share = PathShare.of_costs(costs)
    assert stage["attention"] == attention_buffers(
        model, model.sizes(), ParallelConfig(), 256, share
    )


def laid_out(tree) -> TreeLayout:
    return TreeLayout.from_parents(tree.node_lengths, tree.parents)
