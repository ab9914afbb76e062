"""Memory of a step follows what it executes: activations the tokens, logits a chunk.

Counted on CPU, so that nothing here depends on a clock or an allocator: the storages that autograd
keeps, and the tensors as wide as the vocabulary that are alive at once.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prefix.config import ModelConfig
from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.engine.batch import to_device
from megatron_prefix.model.gpt import TreeGPTModel
from megatron_prefix.model.provider import model_provider, transformer_config
from megatron_prefix.testing import saved_bytes

VOCAB_SIZE = 512
SIZES = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    make_vocab_size_divisible_by=1,
)
CHUNK = 16
"""Rows of logits; every row below has more, so that none are kept for backward."""


def make_model(world, **changes) -> TreeGPTModel:
    sizes = replace(SIZES, lm_head_chunk_size=CHUNK, **changes)
    config = transformer_config(sizes, vocab_size=VOCAB_SIZE, seed=1)
    return model_provider(config=config, pg_collection=world.groups).train()


def make_row(prompt: int, response: int, num_responses: int, sharing: str, copies: int = 1):
    """A packed row of `copies` trees, the first response of each compared with all others."""
    items = []
    for copy in range(copies):
        rng = np.random.default_rng(copy)
        shared, *own = (
            rng.integers(0, VOCAB_SIZE, n) for n in [prompt] + [response] * num_responses
        )
        for i, tokens in enumerate(own):
            tokens[0] = i  # they part at the prompt's end
        paths = [
            ResponsePath(tokens=np.concatenate([shared, tokens]), loss_start=prompt)
            for tokens in own
        ]
        tree = build_tree(paths, [Pair(chosen=0, rejected=i) for i in range(1, num_responses)])
        for item in range(1 if sharing == "tree" else tree.num_pairs):
            seen = view(tree, sharing, item)
            items.append(RowItem(group=copy, view=seen, pair_weights=np.ones(len(seen.pairs))))
    return collate_packed(items)


def kept(model: TreeGPTModel, row) -> int:
    batch = to_device(row, torch.device("cpu"))
    return saved_bytes(
        lambda: model(batch.tokens, None, None, packed_seq_params=batch.params),
        model.parameters(),
    )


ROWS = {
    "a pair": (make_row(300, 40, 2, "tree"), 380),
    "the same pair unshared": (make_row(300, 40, 2, "none"), 680),
    "packed pairs": (make_row(300, 40, 2, "tree", copies=4), 1520),
    "eight responses": (make_row(300, 40, 8, "tree"), 620),
    "a short prompt": (make_row(20, 200, 4, "tree"), 820),
}


RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def test_activations_follow_executed_tokens(world):
    model = make_model(world)
    a_token = {}
    for name, (row, num_tokens) in ROWS.items():
        assert len(row.tokens) == num_tokens
        a_token[name] = kept(model, row) / num_tokens
    for name, num_bytes in a_token.items():
        assert num_bytes == pytest.approx(a_token["a pair"], rel=0.05), (name, a_token)


@pytest.mark.parametrize("name", ROWS)
def test_recomputed_layers_keep_their_inputs_alone(world, name):
    """What each layer more keeps of a token: one hidden row."""
    row, num_tokens = ROWS[name]
    few, many = (kept(make_model(world, num_layers=n, **RECOMPUTED), row) for n in (2, 6))
    assert (many - few) / 4 == pytest.approx(num_tokens * SIZES.hidden_size * 4, rel=0.05)


def test_a_layer_keeps_what_memory_is_planned_for(world):
    """The table at the head of memory.py, in float32; queries and keys are not kept twice."""
    row, num_tokens = ROWS["a pair"]
    few, many = (kept(make_model(world, num_layers=n), row) for n in (2, 6))
    width, ffn, heads = SIZES.hidden_size, SIZES.ffn_hidden_size, SIZES.num_attention_heads
    groups, head_dim = SIZES.num_query_groups or heads, width // heads
    values = 4 * width + (2 * heads + 2 * groups) * head_dim + 3 * ffn + heads
    assert (many - few) / 4 / num_tokens == pytest.approx(4 * values, rel=0.02)


def test_sharing_saves_activations_as_it_saves_tokens(world):
    model = make_model(world)
    shared, unshared = (make_row(400, 25, 8, sharing) for sharing in ("tree", "none"))
    tokens = len(unshared.tokens) / len(shared.tokens)
    assert tokens > 9, "every pair has its own copy of chosen and prompt"
    assert kept(model, unshared) / kept(model, shared) == pytest.approx(tokens, rel=0.05)


def test_a_whole_table_of_logits_would_be_noticed(world):
    """The count above sees what the head keeps where its chunk is larger than the row."""
    model, (row, _) = make_model(world), ROWS["a short prompt"]
    in_chunks = kept(model, row)
    model.config.lm_head_chunk_size = 4096
    extra = kept(model, row) - in_chunks
    assert extra >= row.num_projected * VOCAB_SIZE * 4 > 0.05 * in_chunks


class WideBytes(TorchDispatchMode):
    """Most bytes alive at once in tables whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.size(-1) == VOCAB_SIZE:
                if x.size(-2) != SIZES.hidden_size:  # the weight and its gradient, transposed
                    self._add(x.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key = storage.data_ptr()
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.alive -= num_bytes


def logits_peak(model: TreeGPTModel, row) -> int:
    """Most bytes of logits, and what is as wide as they are, alive in forward and backward."""
    batch = to_device(row, torch.device("cpu"))
    gc.collect()
    with WideBytes() as wide:
        model(batch.tokens, None, None, packed_seq_params=batch.params).sum().backward()
    return wide.peak


def test_logits_follow_a_chunk(world):
    """Twice the rows take the same memory, twice the chunk takes twice as much."""
    model = make_model(world)
    short, long = (make_row(20, length, 4, "tree") for length in (100, 200))
    assert long.num_projected > 1.9 * short.num_projected > 10 * CHUNK
    one = logits_peak(model, short)
    assert one <= 4 * CHUNK * VOCAB_SIZE * 4, "a few tables of one chunk"
    assert logits_peak(model, long) == one
    model.config.lm_head_chunk_size = 2 * CHUNK
    assert logits_peak(model, short) == 2 * one
    model.config.lm_head_chunk_size = 4096
    assert logits_peak(model, long) >= 2 * long.num_projected * VOCAB_SIZE * 4
