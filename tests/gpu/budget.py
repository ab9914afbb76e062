"""How far a backend may be from the dense specification in float64.

The error budget is derived, not chosen: the same attention is computed by plain torch in the same
low precision, and a backend may err at most a few times as much against float64, or round once or
twice what it adds up.

What it adds up may be larger than the sum. With weights P, the gradient of a score is
P (dO.V - dO.O), and so dQ and dK are differences of two terms. For a query that sees one key the
two are equal: dQ is 0, plain torch finds 0, and a kernel finds the rounding of either term. The
budget has a floor by the size of one term, which is the gradient of attention whose denominators
are held fast (`terms_of`).
"""

import numpy as np
import pytest
import torch

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.backends import load_backend
from megatron_prefix.attention.backends.dense import masked_attention, visibility
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, random_heads

DEVICE = "cuda"
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16]
BUDGET_FACTOR = 3.0
"""A backend's error over that of plain torch in the same precision: both round the same numbers,
in another order. Holds for the largest and for the mean error."""
BUDGET_FLOOR = 2.0
"""Roundings of the largest (mean) value or term, if the error of plain torch is almost zero."""

FORESTS = {
    "pairs": TreeLayout.from_parents([105, 36, 41, 230, 17, 64], [-1, 0, 0, -1, 3, 3]),
    "deep": random_forest(np.random.default_rng(3), num_trees=4, max_length=40),
    "chains": TreeLayout.from_parents([200, 57, 90], [-1, 0, -1]),
    "tokens": TreeLayout.from_parents([1, 1, 1, 1], [-1, 0, 0, -1]),
    "single_tokens": TreeLayout.from_parents([1, 1, 1], [-1, -1, -1]),
    "long": TreeLayout.from_parents([700, 300, 513, 60, 129, 77], [-1, 0, 0, 2, 2, -1]),
}


def skip_without(backend, dtype, head_dim, features=()):
    """Skip, with the reason and the remedy, if `backend` does not run here, or lacks a feature."""
    if obstacle := load_backend(backend).obstacle(torch.device(DEVICE), dtype, head_dim, features):
        pytest.skip(f"{backend}: {obstacle}")


def forward_backward(attention, q, k, v, grad_out):
    out = attention(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), grad_out))


def in_float64(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def terms_of(mask, scale):
    """Attention under `mask`, whose softmax does not differentiate its denominators."""

    def attention(q, k, v):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) * scale
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = (scores - scores.detach().logsumexp(-1, keepdim=True)).exp()
        return torch.einsum("nqk,knh->qnh", weights, v)

    return attention


def assert_within_budget(results, low, mask, scale=0.125, softcap=None, sinks=None):
    """(out, dq, dk, dv) of the inputs `low`, q, k, v and the output's gradient."""
    dtype, exact = low[0].dtype, in_float64(low)

    def dense(q, k, v):
        return masked_attention(q, k, v, mask, scale, softcap, sinks)

    plain, expected = forward_backward(dense, *low), forward_backward(dense, *exact)
    terms = forward_backward(terms_of(mask, scale), *exact)
    names = ("out", "dq", "dk", "dv")
    for name, f, p, e, t in zip(names, results, plain, expected, terms, strict=True):
        assert f.dtype == dtype and f.isfinite().all(), name
        for measure in (torch.max, torch.mean):
            error = measure((f.double() - e).abs())
            rounding = torch.finfo(dtype).eps * max(measure(e.abs()), measure(t.abs()))
            budget = BUDGET_FACTOR * measure((p.double() - e).abs()) + BUDGET_FLOOR * rounding
            assert error <= budget, f"{name}: {error} > {budget} ({measure.__name__})"


def mask_of(plan):
    """bool [L, S]: who sees whom under a plan of some rows or all."""
    mask = visibility(plan.layout, "cpu", plan.window)
    mask = mask if plan.q_tokens is None else mask[torch.from_numpy(plan.q_tokens)]
    mask = mask if plan.kv_tokens is None else mask[:, torch.from_numpy(plan.kv_tokens)]
    return mask.to(plan.device)


def check_backend(
    backend,
    layout,
    heads,
    dtype,
    q_tokens=None,
    kv_tokens=None,
    device=DEVICE,
    window=None,
    softcap=None,
    has_sinks=False,
):
    """A backend against dense, values and gradients, on a layout or on some rows of it."""
    plan = TreePlan(layout, device, q_tokens, kv_tokens, window)
    sinks = torch.linspace(-1, 2, heads[0], device=device) if has_sinks else None
    low_q, _, _, grad = random_heads(plan.num_queries, *heads, dtype=dtype, device=device)
    _, low_k, low_v, _ = random_heads(plan.num_keys, *heads, seed=1, dtype=dtype, device=device)
    low = [low_q, low_k, low_v, grad]
    scale = heads[2] ** -0.5
    settings = {"softcap": softcap, "sinks": sinks}
    results = forward_backward(
        lambda *x: tree_attention(*x, plan, backend, scale, **settings), *low
    )
    assert_within_budget(results, low, mask_of(plan), scale, **settings)
