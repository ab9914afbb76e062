"""The model on packed trees against every response alone, and against itself in plain torch.

In float64, so that equal means equal to rounding. Shapes: T tokens, C hidden channels, N query
heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import (
    EXACT,
    RECOMPUTE,
    VARIANTS,
    VOCAB,
    Outcome,
    chain,
    items,
    logps_of,
    make_model,
    outcome,
    pack,
    random_model,
    weights_of,
)
from torch import Tensor
from torch.nn.functional import silu

from megatron_prefix.data.steps.collate import collate_padded
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.tree import PrefixTree, ResponsePath, build_tree
from megatron_prefix.testing import random_group

pytestmark = pytest.mark.sample


def depth(tree: PrefixTree) -> int:
    return max(len(tree.path(node)) for node in range(tree.num_nodes))


def test_the_forest_is_not_trivial(forest):
    trees, _ = forest
    children = [np.bincount(t.parents[t.parents >= 0]).max() for t in trees]
    passed = [
        r
        for t in trees
        for r in range(t.num_responses)
        if any(t.response_last[r] in t.path(int(last))[:-1] for last in t.response_last)
    ]
    assert max(children) >= 3 and max(depth(t) for t in trees) >= 4
    assert passed, "no response is the beginning of another"
    assert max(np.bincount(t.response_sets).max() for t in trees) == 6
    targets = pack(trees)
    assert targets.num_projected < len(targets.logit_token), "no row predicts for two responses"


@pytest.mark.parametrize("chunk", [2048, 7])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("backend", ["dense", "path"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_trees_equal_every_response_alone(
    world, forest, alone, variant, backend, recompute, chunk
):
    model = random_model(
        world,
        attention_backend=backend,
        lm_head_chunk_size=chunk,
        **VARIANTS[variant],
        **RECOMPUTE[recompute],
    )
    packed = outcome(model, [pack(forest[0])])
    assert all(g.abs().max() > 1e-6 for g in packed.gradients.values()), "a parameter is not used"
    assert max(packed.errors(alone(variant))) < EXACT


@pytest.mark.parametrize("multiple", [1, 64])
def test_rows_may_be_cut_and_padded(world, forest, alone, multiple):
    """Two rows of trees with a padding tree, and padded sequences, are still the same."""
    model = random_model(world, **VARIANTS["untied"])
    trees, _ = forest
    rows = [pack(trees[:2], multiple), pack(trees[2:], multiple)]
    assert max(outcome(model, rows).errors(alone("untied"))) < EXACT


def test_padded_sequences_equal_every_response_alone(world):
    rng = np.random.default_rng(12)
    groups = [random_group(rng, vocab_size=VOCAB, max_turns=1) for _ in range(3)]
    padded = collate_padded(items([build_tree(*g) for g in groups], "response"), 8)
    rows = [chain(path.tokens, path.loss_start) for paths, _ in groups for path in paths]
    assert len(padded.tokens) % len(rows) == 0
    model = random_model(world)
    assert max(outcome(model, [padded]).errors(outcome(model, rows))) < EXACT


def test_an_empty_row_adds_nothing(world, forest):
    model = random_model(world)
    once = outcome(model, [pack(forest[0])])
    twice = outcome(model, [pack(forest[0]), pack([], 8)])
    assert torch.equal(once.logps, twice.logps)
    assert all(torch.equal(twice.gradients[name], g) for name, g in once.gradients.items())


@pytest.mark.parametrize("backend", ["dense", "path"])
@pytest.mark.parametrize("source", ["few_hh", "few_oasst"])
def test_real_groups_equal_every_response_alone(world, request, source, backend):
    dataset = PreferenceDataset(request.getfixturevalue(source))
    smallest = np.argsort(dataset.groups_num_tokens())[:2]
    trees = [dataset[int(group)] for group in smallest]
    rows = [chain(*tree.response_tokens(r)) for tree in trees for r in range(tree.num_responses)]
    model = random_model(world, vocab_size=dataset.vocab_size, attention_backend=backend)
    assert max(outcome(model, [pack(trees)]).errors(outcome(model, rows))) < EXACT


# What the model computes, written once more in plain torch.


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x_TNH: Tensor) -> Tensor:
    half = x_TNH.size(-1) // 2
    powers = torch.arange(half, dtype=torch.float32) / half
    angle = torch.arange(x_TNH.size(0), dtype=torch.float32)[:, None] * 10000.0**-powers
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = x_TNH[..., :half], x_TNH[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def plain_attention(
    x_TC: Tensor, w: dict[str, Tensor], heads: int, groups: int, settings: dict, layer: int
) -> Tensor:
    qkv = x_TC @ w["self_attention.linear_qkv.weight"].T
    qkv = qkv + w.get("self_attention.linear_qkv.bias", 0.0)
    # A group after another: its query heads, its key, its value.
    qkv = qkv.view(len(x_TC), groups, heads // groups + 2, -1)
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    if "self_attention.q_layernorm.weight" in w:
        q = rms_norm(q, w["self_attention.q_layernorm.weight"])
        k = rms_norm(k, w["self_attention.k_layernorm.weight"])
    q, k = rotate(q), rotate(k)
    outs = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = q[:, head] @ k[:, group].T / math.sqrt(q.size(-1))
        hidden = torch.ones_like(scores).triu(1).bool()
        if cap := settings.get("attn_logit_softcapping"):
            scores = cap * (scores / cap).tanh()
        if settings.get("window_attn_skip_freq", (0, 0, 0))[layer]:
            hidden |= ~torch.ones_like(scores).triu(-settings["window_size"][0]).bool()
        weights = scores.masked_fill(hidden, -math.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if settings.get("softmax_type") == "learnable":
            total = total + w["self_attention.core_attention.softmax_offset"][head].exp()
        outs.append(weights / total @ v[:, group])
    return torch.cat(outs, -1) @ w["self_attention.linear_proj.weight"].T


def plain_logp(state: dict[str, Tensor], path: ResponsePath, settings: dict) -> Tensor:
    """Log-probability of one response by the model's weights and nothing else of it."""
    tokens = torch.from_numpy(path.tokens)
    embedding = state["embedding.word_embeddings.weight"]
    x = embedding[tokens]
    for layer in range(3):
        start = f"decoder.layers.{layer}."
        w = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        normed = rms_norm(x, w["input_layernorm.weight"])
        x = x + plain_attention(normed, w, 6, 2, settings, layer)
        gate, up = (
            rms_norm(x, w["pre_mlp_layernorm.weight"]) @ w["mlp.linear_fc1.weight"].T
        ).chunk(2, -1)
        x = x + (silu(gate) * up) @ w["mlp.linear_fc2.weight"].T
    x = rms_norm(x, state["decoder.final_layernorm.weight"])
    logits = x @ state.get("output_layer.weight", embedding)[:VOCAB].T
    logps = logits[path.loss_start - 1 : -1].log_softmax(-1)
    return logps.gather(1, tokens[path.loss_start :, None]).sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_the_one_written_out_in_plain_torch(world, forest, alone, variant):
    state = dict(random_model(world, **VARIANTS[variant]).named_parameters())
    with torch.no_grad():
        expected = torch.stack([plain_logp(state, path, VARIANTS[variant]) for path in forest[1]])
    error = (alone(variant).logps - expected).abs() / expected.abs()
    assert error.max() < 1e-6, "the angles are float32 on both sides, in two orders of operations"


# What must not change, bit for bit or but for rounding.


def leaf_of_one_response(tree: PrefixTree) -> tuple[int, int]:
    """A response and its last node, which no other path enters."""
    for response, node in enumerate(tree.response_last.tolist()):
        others = [r for r in range(tree.num_responses) if r != response]
        if all(node not in tree.path(int(tree.response_last[r])) for r in others):
            return response, node
    raise AssertionError("every response goes on in another")


@pytest.mark.parametrize("double", [False, True])
def test_another_response_leaves_its_siblings_bit_identical(world, forest, double):
    trees, _ = forest
    response, node = leaf_of_one_response(trees[1])
    tokens = trees[1].tokens.copy()
    start, end = trees[1].node_offsets[node : node + 2]
    tokens[start:end] = (tokens[start:end] + 17) % VOCAB
    changed = [trees[0], replace(trees[1], tokens=tokens), *trees[2:]]
    model = make_model(world, attention_backend="dense")
    model = model.double() if double else model
    with torch.no_grad():
        before, after = logps_of(model, pack(trees)), logps_of(model, pack(changed))
    differs = (before != after).nonzero().flatten().tolist()
    assert differs == [trees[0].num_responses + response]


@pytest.mark.parametrize("backend", ["dense", "path"])
def test_the_order_of_siblings_changes_nothing(world, backend):
    rng = np.random.default_rng(13)
    paths, _ = random_group(rng, vocab_size=VOCAB, max_turns=3, max_responses=6)
    order = rng.permutation(len(paths))
    tree, permuted = build_tree(paths, []), build_tree([paths[i] for i in order], [])
    assert not np.array_equal(tree.tokens, permuted.tokens)
    model = random_model(world, attention_backend=backend)
    model.train()
    gradients = []
    logps = [logps_of(model, pack([tree])), logps_of(model, pack([permuted]))]
    weights = weights_of(len(paths))
    for response_sums, weight in zip(logps, (weights, weights[order]), strict=True):
        gradients.append(
            torch.autograd.grad((response_sums * weight).sum(), list(model.parameters()))
        )
    first, second = (
        Outcome(x, {str(i): g for i, g in enumerate(gs)})
        for x, gs in zip((logps[0][order], logps[1]), gradients, strict=True)
    )
    assert max(first.errors(second)) < EXACT
