"""Every backend on a GPU against the dense specification in float64; see budget.py."""

import numpy as np
import pytest
import torch
from budget import DTYPES, FORESTS, check_backend, forward_backward, needs_cuda, skip_without

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, random_heads

pytestmark = needs_cuda

BACKENDS = ["flash", "te", "flex", "path"]


@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 64), (6, 1, 128)], ids=str)
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forests(backend, forest, heads):
    skip_without(backend, torch.bfloat16, heads[2])
    check_backend(backend, FORESTS[forest], heads, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(backend, head_dim, dtype):
    skip_without(backend, dtype, head_dim)
    check_backend(backend, FORESTS["deep"], (8, 2, head_dim), dtype)


@pytest.mark.parametrize("is_compact", [False, True])
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_plans(backend, rank, is_compact):
    """A context-parallel rank's queries, with all keys or those of their root paths."""
    skip_without(backend, torch.bfloat16, 64)
    layout = random_forest(np.random.default_rng(7), num_trees=6, max_length=60)
    own = np.array_split(np.arange(layout.num_tokens), 4)[rank]
    own = own[np.random.default_rng(rank).random(len(own)) < 0.9]
    held = needed_tokens(layout, own) if is_compact else None
    check_backend(backend, layout, (8, 2, 64), torch.bfloat16, own, held)


SETTINGS = [
    {"window": 1},
    {"window": 9},
    {"window": 150},
    {"softcap": 2.0},
    {"has_sinks": True},
    {"window": 40, "softcap": 2.0, "has_sinks": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_soft_caps_and_sinks(backend, forest, settings):
    features = {"has_sinks": "sinks"}
    skip_without(backend, torch.bfloat16, 64, [features.get(name, name) for name in settings])
    check_backend(backend, FORESTS[forest], (8, 2, 64), torch.bfloat16, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_sinks(backend):
    skip_without(backend, torch.bfloat16, 64, ["sinks"])
    layout = FORESTS["pairs"]
    q, k, v, grad = random_heads(layout.num_tokens, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
    grads = []
    for name in (backend, "dense"):
        sinks = torch.linspace(-1, 2, 8, device="cuda", requires_grad=True)
        inputs = [x.double() if name == "dense" else x for x in (q, k, v)]
        out = tree_attention(*inputs, layout, name, window=40, sinks=sinks)
        grads.append(torch.autograd.grad(out, sinks, grad.to(out.dtype))[0])
    error = (grads[0] - grads[1]).abs().max()
    assert error <= 2e-2 * grads[1].abs().max(), error


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def repeated(backend, layout, times=4):
    q, k, v, grad = random_heads(layout.num_tokens, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    plan = TreePlan(layout, "cuda")
    return [
        forward_backward(lambda *x: tree_attention(*x, plan, backend=backend), q, k, v, grad)
        for _ in range(times)
    ]


@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend, forest, deterministic):
    skip_without(backend, torch.bfloat16, 128)
    first, *others = repeated(backend, FORESTS[forest])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("backend", ["flash", "path"])
def test_key_and_value_gradients_have_them_without_the_switch(backend):
    skip_without(backend, torch.bfloat16, 128)
    first, *others = repeated(backend, FORESTS["long"])
    for _, _, dk, dv in others:
        assert torch.equal(dk, first[2]) and torch.equal(dv, first[3])


@pytest.mark.parametrize("backend", ["flash", "te", "flex"])
def test_memory_kept_for_backward_does_not_grow_with_copies(backend):
    """Eight responses copy the prompt's keys eight times in the call, but not until backward."""
    skip_without(backend, torch.bfloat16, 128)
    layout = TreeLayout.from_parents([4096] + [128] * 8, [-1] + [0] * 8)
    q, k, v, grad = random_heads(layout.num_tokens, 8, 8, 128, dtype=torch.bfloat16, device="cuda")
    plan = TreePlan(layout, "cuda")
    for _ in range(2):  # the first call builds plans and compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = tree_attention(q, k, v, plan, backend=backend)
        kept = torch.cuda.memory_allocated() - before
        torch.autograd.grad(out, (q, k, v), grad)
        del out
    assert kept <= 1.5 * q.nbytes, f"{kept} bytes are kept, q has {q.nbytes}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_path_in_high_precision(dtype):
    layout = FORESTS["deep"]
    inputs = random_heads(layout.num_tokens, 4, 2, 32, dtype=dtype, device="cuda")
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = forward_backward(lambda *x: tree_attention(*x, layout, "dense"), *exact)
    results = forward_backward(lambda *x: tree_attention(*x, layout, "path"), *inputs)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for a, e in zip(results, expected, strict=True):
        assert (a.double() - e).abs().max() <= tolerance
