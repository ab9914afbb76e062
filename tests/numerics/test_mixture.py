"""Mixtures of experts: a row means each response alone, and the auxiliary loss is what it says.

The hand computation walks tokens and experts in plain Python, from what goes into each router; it
knows a token's responses from their paths through the trees.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import (
    CPU,
    RECOMPUTE,
    chain,
    items,
    make_model,
    outcome,
    pack,
    random_model,
)

from megatron_prefix.data.steps.collate import collate_packed, responses_served
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.engine.batch import to_device
from megatron_prefix.model.layers.moe import TreeRouter, row_balance, step_auxiliary
from megatron_prefix.model.parameters import canonical_parameters

EXPERTS = {"num_moe_experts": 5, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
KINDS = {
    "mixtral": EXPERTS,
    "qwen3 moe": {**EXPERTS, "qk_layernorm": True, "moe_router_pre_softmax": True},
}
COEFFICIENT = 0.3
ROUNDING = 1e-6
"""Megatron-Core weighs the chosen experts in float32, whatever the model's precision."""


def counts_by_hand(trees: list[PrefixTree], moe_count: str) -> list[float]:
    """How often each token of a row counts, from the paths of its responses."""
    counts = []
    for tree in trees:
        paths = [tree.path(int(last)) for last in tree.response_last]
        for node in range(tree.num_nodes):
            served = sum(node in path for path in paths)
            counts += [float(served if moe_count == "responses" else 1)] * tree.node_lengths[node]
    return counts


def balance_by_hand(logits: torch.Tensor, counts: list[float], topk: int) -> torch.Tensor:
    """E sum_e f_e P_e over the tokens that count, one at a time."""
    num_experts, total = logits.size(1), sum(counts)
    chosen, probability = [0.0] * num_experts, [torch.zeros(()).double()] * num_experts
    for row, count in zip(logits, counts, strict=False):
        exps = [x.exp() for x in row]
        for expert in sorted(range(num_experts), key=lambda e: -float(row[e]))[:topk]:
            chosen[expert] += count / (topk * total)
        for expert in range(num_experts):
            probability[expert] = probability[expert] + count / total * exps[expert] / sum(exps)
    return num_experts * sum(f * p for f, p in zip(chosen, probability, strict=True))


def gradients(model, rows, step_count: float) -> dict[str, torch.Tensor]:
    """Gradients of the auxiliary loss alone: the model's output has weight 0."""
    model.train()
    model.zero_grad()
    for row in rows:
        batch = to_device(row, CPU, step_count=step_count)
        token_logps = model(batch.tokens, None, None, packed_seq_params=batch.params)
        (0 * token_logps.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def gradients_by_hand(model, rows, counts: list[list[float]]) -> dict[str, torch.Tensor]:
    """From a model without auxiliary loss, by autograd through what its routers were given."""
    assert model.config.moe_aux_loss_coeff == 0.0
    model.train()
    model.zero_grad()
    step = sum(sum(own) for own in counts)
    for row, own in zip(rows, counts, strict=True):
        inputs: list = []
        hooks = [
            module.register_forward_hook(lambda m, args, _, seen=inputs: seen.append((m, args[0])))
            for module in model.modules()
            if isinstance(module, TreeRouter)
        ]
        batch = to_device(row, CPU)
        model(batch.tokens, None, None, packed_seq_params=batch.params)
        assert len(inputs) == model.config.num_layers
        for router, hidden in inputs:
            logits = hidden.squeeze(1) @ router.weight.T
            balance = balance_by_hand(logits[: len(own)], own, model.config.moe_router_topk)
            (COEFFICIENT * sum(own) / step * balance).backward(retain_graph=True)
        for hook in hooks:
            hook.remove()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def worst(ours: dict, expected: dict) -> float:
    scale = max(float(x.abs().max()) for x in expected.values())
    return max(float((ours[name] - x).abs().max()) for name, x in expected.items()) / scale


@pytest.mark.parametrize("backend", ["dense", "path"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_row_is_each_response_alone(world, forest, kind, backend):
    trees, paths = forest
    model = random_model(world, attention_backend=backend, **KINDS[kind])
    shared = outcome(model, [pack(trees, 32)])
    alone = outcome(model, [chain(path.tokens, path.loss_start) for path in paths])
    logp_error, gradient_error = shared.errors(alone)
    assert logp_error <= 1e-7 and gradient_error <= ROUNDING


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputation_changes_nothing(world, forest, kind):
    settings = {**EXPERTS, "moe_aux_loss_coeff": COEFFICIENT}
    rows = [pack(forest[0][:2]), pack(forest[0][2:])]
    plain = gradients(random_model(world, **settings), rows, 100.0)
    again = gradients(random_model(world, **settings, **RECOMPUTE[kind]), rows, 100.0)
    for name, expected in plain.items():
        assert torch.equal(again[name], expected), name


@pytest.mark.parametrize("moe_count", ["tokens", "responses"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_auxiliary_gradient_is_that_of_a_hand_computation(world, forest, kind, moe_count):
    """Over a step of three rows, one of them nothing but padding."""
    trees, _ = forest
    parts = [trees[:2], trees[2:4], []]
    rows = [pack(part, 16) for part in parts]
    assert [len(row.tokens) > row.num_tokens for row in rows][-1]
    counts = [counts_by_hand(part, moe_count) for part in parts]
    plain = random_model(world, **KINDS[kind])
    expected = gradients_by_hand(plain, rows[:2], counts[:2])
    settings = {"moe_aux_loss_coeff": COEFFICIENT, "moe_count": moe_count}
    model = random_model(world, **KINDS[kind], **settings)
    step = sum(sum(own) for own in counts)
    assert worst(gradients(model, rows, step), expected) <= ROUNDING
    assert max(float(x.abs().max()) for x in expected.values()) > 1e-3
    balance = step_auxiliary([model], CPU)
    assert 0.9 < balance < EXPERTS["num_moe_experts"] and step_auxiliary([model], CPU) == 0.0
    wrong = "responses" if moe_count == "tokens" else "tokens"
    other = random_model(world, **KINDS[kind], **{**settings, "moe_count": wrong})
    assert worst(gradients(other, rows, step), expected) > 1e-2, "both counts are one"


def test_responses_count_as_if_each_ran_alone(world, forest):
    """One row of shared trees, and one row with a tree for every response."""
    trees, _ = forest
    apart = [tree.restrict([r]) for tree in trees for r in range(tree.num_responses)]
    shared, separate = collate_packed(items(trees)), collate_packed(items(apart))
    step = float(shared.served.sum())
    assert separate.num_tokens == step > shared.num_tokens
    model = random_model(world, **EXPERTS, moe_aux_loss_coeff=COEFFICIENT, moe_count="responses")
    assert worst(gradients(model, [shared], step), gradients(model, [separate], step)) <= ROUNDING


@pytest.mark.parametrize("moe_count", ["tokens", "responses"])
def test_padding_counts_nothing(world, forest, moe_count):
    settings = {**EXPERTS, "moe_aux_loss_coeff": COEFFICIENT, "moe_count": moe_count}
    model = random_model(world, **settings)
    bare, padded = pack(forest[0]), pack(forest[0], 400)
    assert len(padded.tokens) > 1.5 * len(bare.tokens)
    expected = gradients(model, [bare], 100.0)
    assert worst(gradients(model, [padded], 100.0), expected) <= 1e-12
    first = step_auxiliary([model], CPU)
    filled = replace(padded, served=np.maximum(padded.served, 1))
    assert worst(gradients(model, [filled], 100.0), expected) > 1e-2, "padding would not matter"
    assert first > 0


def test_shares_of_a_row_add_up(world):
    """Two halves of a row, each with the counts of both, as sequence parallelism has them."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(12, 4, generator=generator).double().softmax(1)
    chosen = torch.zeros(12, 4, dtype=torch.bool).scatter(1, probs.topk(2).indices, True)
    counts = torch.tensor([3.0] * 5 + [1.0] * 4 + [0.0] * 3)
    whole = row_balance(probs, chosen, counts, 2)
    by_hand = balance_by_hand(probs.log(), counts.tolist(), 2)
    assert torch.allclose(whole, 19 * by_hand, rtol=1e-12)
    assert row_balance(probs, chosen, torch.zeros(12), 2) == 0
    even = torch.full((8, 4), 0.25).double()
    rounds = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]] * 4, dtype=torch.bool)
    assert float(row_balance(even, rounds, torch.ones(8), 2)) == pytest.approx(8 * 1.0)


def test_served_responses_of_random_trees(forest):
    for tree in forest[0]:
        assert responses_served(tree).tolist() == counts_by_hand([tree], "responses")
    row = pack(forest[0], 64)
    assert row.served.sum() == sum(len(path.tokens) for path in forest[1])
    assert (row.served > 0).sum() == row.num_tokens


def test_a_row_without_counts_is_refused(world, forest):
    model = random_model(world, **EXPERTS, moe_aux_loss_coeff=COEFFICIENT).train()
    for row, step in ((pack(forest[0]), 0.0), (replace(pack(forest[0]), served=None), 100.0)):
        batch = to_device(row, CPU, step_count=step)
        with pytest.raises(ValueError, match="needs MicroBatch.served and to_device"):
            model(batch.tokens, None, None, packed_seq_params=batch.params)
        with torch.no_grad():
            model(batch.tokens, None, None, packed_seq_params=batch.params)


def test_weights_follow_the_number_of_the_expert(world):
    """More experts, or other layers before them: the first ones are the same."""
    few = dict(canonical_parameters(make_model(world, **EXPERTS)))
    many = dict(canonical_parameters(make_model(world, **{**EXPERTS, "num_moe_experts": 7})))
    names = [name for name in few if ".mlp.experts." in name]
    assert len(names) == 3 * 5 * 2 and "decoder.layers.2.mlp.experts.4.linear_fc1.weight" in names
    for name in names:
        assert torch.equal(few[name], many[name]), name
    first, second = (few[f"decoder.layers.0.mlp.experts.{e}.linear_fc1.weight"] for e in (0, 1))
    assert not torch.equal(first, second)
