"""How far a backend may be from the dense specification in float64.

The error budget is derived, not chosen: the same attention is computed by plain torch in the same
low precision, and a backend may err at most a few times as much against float64.
"""

import numpy as np
import pytest
import torch

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.api import why_not
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
"""Roundings of the largest (mean) value, where plain torch happens to err hardly at all."""

FORESTS = {
    "pairs": TreeLayout.from_parents([105, 36, 41, 230, 17, 64], [-1, 0, 0, -1, 3, 3]),
    "deep": random_forest(np.random.default_rng(3), num_trees=4, max_length=40),
    "chains": TreeLayout.from_parents([200, 57, 90], [-1, 0, -1]),
    "tokens": TreeLayout.from_parents([1, 1, 1, 1], [-1, 0, 0, -1]),
    "single_tokens": TreeLayout.from_parents([1, 1, 1], [-1, -1, -1]),
    "long": TreeLayout.from_parents([700, 300, 513, 60, 129, 77], [-1, 0, 0, 2, 2, -1]),
}


def skip_without(backend, dtype, head_dim):
    """Skip, with the reason and the remedy, where `backend` does not run here."""
    if obstacle := why_not(backend, torch.device(DEVICE), dtype, head_dim):
        pytest.skip(f"{backend}: {obstacle}")


def forward_backward(attention, q, k, v, grad_out):
    out = attention(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), grad_out))


def inputs_in(dtype, num_tokens, heads, seed=0):
    """Numbers that `dtype` holds exactly, once in it and once in float64."""
    low = random_heads(num_tokens, *heads, seed=seed, dtype=dtype, device=DEVICE)
    return low, in_float64(low)


def in_float64(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def assert_within_budget(found, plain, exact, dtype):
    for name, f, p, e in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        assert f.dtype == dtype and f.isfinite().all(), name
        for measure in (torch.max, torch.mean):
            error = measure((f.double() - e).abs())
            rounding = torch.finfo(dtype).eps * measure(e.abs())
            budget = BUDGET_FACTOR * measure((p.double() - e).abs()) + BUDGET_FLOOR * rounding
            assert error <= budget, f"{name}: {error} > {budget} ({measure.__name__})"


def check_backend(backend, layout, heads, dtype, q_rows=None, kv_rows=None):
    """A backend against dense, values and gradients, on a layout or on some rows of it."""
    plan = TreePlan(layout, DEVICE, q_rows, kv_rows)
    low_q, _, _, grad = random_heads(plan.num_queries, *heads, dtype=dtype, device=DEVICE)
    _, low_k, low_v, _ = random_heads(plan.num_keys, *heads, seed=1, dtype=dtype, device=DEVICE)
    low = [low_q, low_k, low_v, grad]

    def by(backend):
        return lambda q, k, v: tree_attention(q, k, v, plan, backend=backend)

    expected = forward_backward(by("dense"), *in_float64(low))
    plain = forward_backward(by("dense"), *low)
    assert_within_budget(forward_backward(by(backend), *low), plain, expected, dtype)
