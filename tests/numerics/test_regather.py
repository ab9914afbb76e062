"""Keys that are gathered again in backward: none of them is saved, and calls may be nested."""

import gc
import weakref

import numpy as np
import pytest
import torch
from stand_ins import te_module
from test_attention import assert_close, forward_backward

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.backends import Scoring
from megatron_prefix.attention.backends.regather import KeyGather, attend_gathered
from megatron_prefix.attention.backends.te import te_attention
from megatron_prefix.attention.plan import build_path_plan
from megatron_prefix.testing import random_forest, random_heads


class Counted:
    """Tokens in another order; counts gathers and the gathered tensors that are still alive."""

    def __init__(self, tokens):
        self.tokens, self.num_gathers, self.storages = tokens, 0, []

    def gather(self, k, v):
        self.num_gathers += 1
        gathered = k[self.tokens], v[self.tokens]
        self.storages += [weakref.ref(x.untyped_storage()) for x in gathered]
        return gathered

    def scatter(self, dk, dv):
        return tuple(torch.zeros_like(x).index_copy(0, self.tokens, x) for x in (dk, dv))

    @property
    def key_gather(self):
        return KeyGather(gather=self.gather, scatter=self.scatter)

    def num_alive(self):
        gc.collect()
        return sum(ref() is not None for ref in self.storages)


def case(seed=4):
    layout = random_forest(np.random.default_rng(seed))
    plan = build_path_plan(layout, "cpu")
    assert plan.gather_factor > 1.5
    q, k, v, grad = random_heads(layout.num_tokens, seed=seed)
    expected = forward_backward(
        lambda *x: tree_attention(*x, TreePlan(layout, "cpu"), backend="dense"), q, k, v, grad
    )
    shuffled = torch.randperm(layout.num_tokens)
    back = torch.argsort(shuffled)
    inputs = (q, *(x.detach()[back].requires_grad_() for x in (k, v)), grad)
    expected = (*expected[:2], *(x[back] for x in expected[2:]))
    return plan, Counted(shuffled), inputs, expected


def te_over(plan):
    return lambda q, k, v: te_attention(q, k, v, plan, Scoring(q.size(-1) ** -0.5), te_module)


def test_nested_calls_save_only_own_keys():
    plan, outer, (q, k, v, grad), expected = case()
    out = attend_gathered(te_over(plan), q, k, v, outer.key_gather)
    assert outer.num_gathers == 1 and outer.num_alive() == 0
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert_close((out, *grads), expected)
    assert outer.num_gathers == 2 and outer.num_alive() == 0


def test_gathered_keys_of_te_are_not_saved():
    plan, _, (q, k, v, grad), _ = case()
    gathered = []

    def spy(*sizes):
        kernel = te_module(*sizes)

        def forward(**arguments):
            gathered.extend(weakref.ref(arguments[x]) for x in ("key_layer", "value_layer"))
            return kernel(**arguments)

        return forward

    out = te_attention(q, k, v, plan, Scoring(0.3), spy)
    gc.collect()
    assert len(gathered) == 2 and all(ref() is None for ref in gathered)
    torch.autograd.grad(out, (q, k, v), grad)


def test_nothing_is_saved_without_gradients():
    plan, outer, (q, k, v, _), expected = case()
    with torch.no_grad():
        out = attend_gathered(te_over(plan), q, k, v, outer.key_gather)
    assert (out - expected[0]).abs().max() <= 1e-12
    assert outer.num_gathers == 1 and outer.num_alive() == 0


def test_only_queries_require_gradients():
    plan, outer, (q, k, v, grad), expected = case()
    out = attend_gathered(te_over(plan), q, k.detach(), v.detach(), outer.key_gather)
    assert outer.num_alive() == 0
    (dq,) = torch.autograd.grad(out, (q,), grad)
    assert (dq - expected[1]).abs().max() <= 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_recomputation(use_reentrant):
    plan, outer, (q, k, v, grad), expected = case()
    out = torch.utils.checkpoint.checkpoint(
        lambda *x: attend_gathered(te_over(plan), *x, outer.key_gather),
        q, k, v, use_reentrant=use_reentrant,
    )  # fmt: skip
    assert outer.num_alive() == 0
    out.backward(grad)
    assert_close((out, q.grad, k.grad, v.grad), expected)
