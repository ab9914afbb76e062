"""Queries of some rows of a layout, with keys of the rows they see: every engine equals dense."""

import numpy as np
import pytest
import torch
from test_attention import ENGINES, assert_close, forward_backward

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.attention.plan import build_path_plan
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, random_heads, visibility_by_walking


def some_rows(layout, rng) -> np.ndarray:
    """A few runs of rows, and rows on their own."""
    kept = np.repeat(rng.random(layout.num_tokens // 5 + 1) < 0.4, 5)[: layout.num_tokens]
    kept |= rng.random(layout.num_tokens) < 0.1
    kept[int(rng.integers(layout.num_tokens))] = True
    return np.flatnonzero(kept)


@pytest.mark.parametrize("engine", [*ENGINES, "dense"])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_compact", [False, True])
def test_some_queries_equal_their_rows_of_the_whole(engine, seed, is_compact):
    rng = np.random.default_rng(seed)
    layout = random_forest(rng)
    own = some_rows(layout, rng)
    held = needed_tokens(layout, own) if is_compact else np.arange(layout.num_tokens)
    q, k, v, grad = random_heads(layout.num_tokens, 4, 2, seed=seed)
    only_own = torch.zeros_like(grad)
    only_own[own] = grad[own]
    whole = forward_backward(
        lambda *x: tree_attention(*x, layout, backend="dense"), q, k, v, only_own
    )
    expected = (whole[0][own], whole[1][own], whole[2][held], whole[3][held])

    rows = (own, held) if is_compact else (own,)
    if engine == "dense":
        plan = TreePlan(layout, "cpu", *rows)

        def attention(q, k, v):
            return tree_attention(q, k, v, plan, backend="dense")
    else:
        attention = ENGINES[engine](layout, *rows)
    parts = [x.detach()[i].requires_grad_() for x, i in ((q, own), (k, held), (v, held))]
    assert_close(forward_backward(attention, *parts, grad[own]), expected)


def test_plan_of_the_worked_example():
    layout = TreeLayout.from_parents([3, 2, 4], [-1, 0, 0])
    plan = build_path_plan(layout, "cpu", np.array([3, 4, 6, 7]))
    assert (plan.q_lengths, plan.kv_lengths) == ([2, 2], [5, 6])
    assert plan.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert plan.own_starts == [3, 6] and plan.ancestor_starts == [0, -1]


@pytest.mark.parametrize("seed", range(20))
def test_the_work_is_the_area_that_the_queries_see(seed):
    rng = np.random.default_rng(seed)
    layout = random_forest(rng)
    own = some_rows(layout, rng)
    plan = build_path_plan(layout, "cpu", own)
    visible = visibility_by_walking(layout.lengths, layout.parents)
    area = sum(
        n * (kv - n) + n * (n + 1) // 2
        for n, kv in zip(plan.q_lengths, plan.kv_lengths, strict=True)
    )
    assert area == visible[own].sum()


def test_a_missing_key_is_noticed():
    layout = TreeLayout.from_parents([3, 2, 4], [-1, 0, 0])
    with pytest.raises(AssertionError, match="path is missing"):
        build_path_plan(layout, "cpu", np.array([3, 4]), np.array([0, 1, 3, 4]))
