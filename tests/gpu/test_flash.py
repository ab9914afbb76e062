"""The flash backend on a GPU against the dense specification in float64.

The error budget is derived, not chosen: the same attention is computed by plain torch in the same
low precision, and flash may err at most a few times as much against float64.
"""

import numpy as np
import pytest
import torch

from megatron_prefix.attention import TreePlan, build_path_plan, resolve_backend, tree_attention
from megatron_prefix.attention.dense import masked_attention
from megatron_prefix.attention.flash import aten_operators
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, random_heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16]
BUDGET_FACTOR = 3.0
"""Flash's error over that of plain torch in the same precision: both round the same numbers, in
another order. Holds for the largest and for the mean error."""
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


def forward_backward(attention, q, k, v, grad_out):
    out = attention(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), grad_out))


def inputs_in(dtype, num_tokens, heads, seed=0):
    """Numbers that `dtype` holds exactly, once in it and once in float64."""
    low = random_heads(num_tokens, *heads, seed=seed, dtype=dtype, device="cuda")
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in low]
    return low, exact


def assert_within_budget(flash, plain, exact, dtype):
    for name, f, p, e in zip(("out", "dq", "dk", "dv"), flash, plain, exact, strict=True):
        assert f.dtype == dtype and f.isfinite().all(), name
        for measure in (torch.max, torch.mean):
            error = measure((f.double() - e).abs())
            rounding = torch.finfo(dtype).eps * measure(e.abs())
            budget = BUDGET_FACTOR * measure((p.double() - e).abs()) + BUDGET_FLOOR * rounding
            assert error <= budget, f"{name}: {error} > {budget} ({measure.__name__})"


def check(layout, heads, dtype):
    low, exact = inputs_in(dtype, layout.num_tokens, heads)
    plan = TreePlan(layout, "cuda")

    def by(backend):
        return lambda q, k, v: tree_attention(q, k, v, plan, backend=backend)

    expected = forward_backward(by("dense"), *exact)
    plain = forward_backward(by("dense"), *low)
    assert_within_budget(forward_backward(by("flash"), *low), plain, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_groups", [8, 2, 1])
def test_aten_flash_operators_align_bottom_right_with_gqa_in_backward(num_groups, dtype):
    """The operators alone, no plan: 5 < 12, 130 < 300 and 64 = 64 queries against keys."""
    q_lengths, kv_lengths = [5, 130, 64, 1], [12, 300, 64, 70]
    cu_q, cu_kv = (
        torch.tensor([0, *np.cumsum(x)], dtype=torch.int32, device="cuda")
        for x in (q_lengths, kv_lengths)
    )
    heads = (8, num_groups, 64)
    (q, _, _, grad_out), (q64, _, _, grad64) = inputs_in(dtype, sum(q_lengths), heads)
    (_, k, v, _), (_, k64, v64, _) = inputs_in(dtype, sum(kv_lengths), heads, seed=1)
    q_piece = torch.repeat_interleave(torch.arange(4), torch.tensor(q_lengths))
    kv_piece = torch.repeat_interleave(torch.arange(4), torch.tensor(kv_lengths))
    from_last_q = torch.cat([torch.arange(n - 1, -1, -1) for n in q_lengths])
    from_last_kv = torch.cat([torch.arange(n - 1, -1, -1) for n in kv_lengths])
    mask = (q_piece[:, None] == kv_piece) & (from_last_kv >= from_last_q[:, None])
    mask = mask.cuda()

    forward, backward = aten_operators()
    with torch.no_grad():
        out, lse, rng_state, unused, _ = forward(
            q, k, v, cu_q, cu_kv, 130, 300, 0.0, True, False, scale=0.125
        )
        grads = backward(
            grad_out, q, k, v, out, lse, cu_q, cu_kv, 130, 300, 0.0, True, rng_state, unused,
            scale=0.125,
        )  # fmt: skip

    def dense(q, k, v):
        return masked_attention(q, k, v, mask, 0.125)

    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    expected = forward_backward(dense, q64, k64, v64, grad64)
    plain = forward_backward(dense, q, k, v, grad_out)
    assert_within_budget((out, *grads), plain, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 64), (6, 1, 128)], ids=str)
@pytest.mark.parametrize("forest", FORESTS)
def test_flash_equals_dense(forest, heads, dtype):
    check(FORESTS[forest], heads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_flash_equals_dense_at_each_head_dim(head_dim, dtype):
    check(FORESTS["deep"], (8, 2, head_dim), dtype)


def test_a_leaky_mask_exceeds_the_budget():
    layout = TreeLayout.from_parents([60, 40, 50], [-1, 0, 0])
    low, exact = inputs_in(torch.bfloat16, 150, (4, 2, 64))
    leaky = torch.ones(150, 150, dtype=torch.bool, device="cuda").tril()
    expected = forward_backward(lambda *x: masked_attention(*x, leaky, 0.125), *exact)
    plain = forward_backward(lambda *x: masked_attention(*x, leaky, 0.125), *low)
    flash = forward_backward(lambda *x: tree_attention(*x, layout, "flash"), *low)
    with pytest.raises(AssertionError, match="out: .* > "):
        assert_within_budget(flash, plain, expected, torch.bfloat16)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def backward_twice(layout):
    low, _ = inputs_in(torch.bfloat16, layout.num_tokens, (8, 2, 128))
    plan = TreePlan(layout, "cuda")
    return [
        forward_backward(lambda *x: tree_attention(*x, plan, backend="flash"), *low)
        for _ in range(4)
    ]


@pytest.mark.parametrize("forest", FORESTS)
def test_backward_is_deterministic_bit_for_bit(forest, deterministic):
    first, *others = backward_twice(FORESTS[forest])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_key_and_value_gradients_are_deterministic_without_the_switch():
    first, *others = backward_twice(FORESTS["long"])
    for _, _, dk, dv in others:
        assert torch.equal(dk, first[2]) and torch.equal(dv, first[3])


def test_copy_sum_on_the_device_equals_the_one_on_cpu():
    layout = FORESTS["deep"]
    plans = [build_path_plan(layout, device) for device in ("cpu", "cuda")]
    torch.manual_seed(0)
    copies = torch.randn(len(plans[0].kv_index), 2, 64).bfloat16()
    on_cpu, on_device = plans[0].sum_copies(copies), plans[1].sum_copies(copies.cuda())
    assert torch.equal(on_cpu, on_device.cpu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_path_backend_on_the_device(dtype):
    layout = FORESTS["deep"]
    inputs = random_heads(layout.num_tokens, 4, 2, 32, dtype=dtype, device="cuda")
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = forward_backward(lambda *x: tree_attention(*x, layout, "dense"), *exact)
    results = forward_backward(lambda *x: tree_attention(*x, layout, "path"), *inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for a, e in zip(results, expected, strict=True):
        assert (a.double() - e).abs().max() <= tolerance


def test_auto_is_flash_here():
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "flash"
    assert resolve_backend("auto", "cuda", torch.float32) == "path"
    q, k, v, _ = random_heads(9, 4, 2, 20, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="multiple of 8"):
        tree_attention(q, k, v, TreeLayout.from_parents([3, 2, 4], [-1, 0, 0]), "flash")
