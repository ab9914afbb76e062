"""Operations of a row: those of a mixture against those of one network of the same work."""

from __future__ import annotations

import numpy as np

from megatron_prefix.config import ModelConfig
from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import build_tree
from megatron_prefix.estimate.flops import forward_flops
from megatron_prefix.testing import random_group

SIZES = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4}


def test_a_token_costs_its_experts_and_the_router():
    tree = build_tree(*random_group(np.random.default_rng(0)))
    item = RowItem(group=0, view=view(tree, "tree", 0), pair_weights=np.ones(tree.num_pairs))
    row = collate_packed([item], 16)
    dense = forward_flops(ModelConfig(**SIZES, ffn_hidden_size=3 * 20).sizes(), 61, row)
    experts = {"num_moe_experts": 8, "moe_router_topk": 3}
    mixture = ModelConfig(**SIZES, ffn_hidden_size=7, **experts, moe_ffn_hidden_size=20)
    flops = forward_flops(mixture.sizes(), 61, row)
    assert flops.linear - dense.linear == 3 * 2 * 32 * 8 * len(row.tokens)
    assert (flops.attention, flops.head) == (dense.attention, dense.head)
    as_large = ModelConfig(**SIZES, ffn_hidden_size=20, **experts)
    assert forward_flops(as_large.sizes(), 61, row) == flops
