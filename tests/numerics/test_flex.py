"""FlexAttention's masks against a walk up the parents, its outputs and gradients against dense."""

import numpy as np
import pytest
import torch
from test_partial_plans import some_rows

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.backends import Scoring, flex
from megatron_prefix.attention.backends.flex import (
    BLOCK,
    block_mask,
    block_ranges,
    compiled,
    flex_tree_attention,
    plan_block_mask,
    query_intervals,
)
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.errors import RunError
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, random_heads, visibility_by_walking


def parts(seed, kind):
    """A layout, and rows of it for queries and keys."""
    rng = np.random.default_rng(seed)
    layout = random_forest(rng, num_trees=int(rng.integers(1, 6)))
    if kind == "whole":
        return layout, None, None
    own = some_rows(layout, rng)
    return layout, own, needed_tokens(layout, own) if kind == "compact" else None


def walked(layout, own, held):
    """bool [L, S] from the definition."""
    visible = visibility_by_walking(layout.lengths, layout.parents)
    visible = visible if own is None else visible[own]
    return visible if held is None else visible[:, held]


def blockwise(visible, block):
    """Of each block of queries and keys whether some pair sees, and whether all of B x B do."""
    shape = [-(-n // block) * block for n in visible.shape]
    padded = np.zeros(shape, bool)
    padded[: visible.shape[0], : visible.shape[1]] = visible
    blocks = padded.reshape(shape[0] // block, block, shape[1] // block, block)
    return blocks.any((1, 3)), blocks.all((1, 3))


KINDS = ["whole", "some_queries", "compact"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_intervals_and_block_ranges_are_what_a_walk_sees(seed, kind):
    layout, own, held = parts(seed, kind)
    visible = walked(layout, own, held)
    intervals = query_intervals(layout, own, held)
    q = np.arange(len(visible))[:, None]
    assert np.array_equal((intervals[0] <= q) & (q < intervals[1]), visible)
    for block in (1, 2, 4, 7, 16):
        some, whole = blockwise(visible, block)
        ranges = block_ranges(intervals, len(visible), block)
        q_block = np.arange(len(some))[:, None]
        assert np.array_equal((ranges[0] <= q_block) & (q_block < ranges[1]), some)
        assert np.array_equal((ranges[2] <= q_block) & (q_block < ranges[3]), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_block_mask_lists_those_blocks(seed, kind):
    layout, own, held = parts(seed, kind)
    some, whole = blockwise(walked(layout, own, held), 8)
    mask = block_mask(layout, torch.device("cpu"), own, held, block=8)
    for counts, indices, expected in (
        (mask.kv_num_blocks, mask.kv_indices, some & ~whole),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
        (mask.q_num_blocks, mask.q_indices, (some & ~whole).T),
        (mask.full_q_num_blocks, mask.full_q_indices, whole.T),
    ):
        rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
        listed = [sorted(row[:n]) for n, row in rows]
        assert listed == [np.flatnonzero(row).tolist() for row in expected]
    assert mask.seq_lengths == walked(layout, own, held).shape


def test_block_mask_of_the_module_is_torchs_own():
    from torch.nn.attention.flex_attention import create_block_mask

    layout = TreeLayout.from_parents([300, 200, 170, 90], [-1, 0, 0, -1])
    plan = TreePlan(layout, "cpu")
    own = plan_block_mask(plan)
    theirs = create_block_mask(own.mask_mod, 1, 1, 760, 760, device="cpu", BLOCK_SIZE=BLOCK)
    assert plan_block_mask(plan) is own
    assert torch.equal(own.to_dense(), theirs.to_dense())
    assert torch.equal(own.full_kv_num_blocks, theirs.full_kv_num_blocks)


def long_forest(seed):
    return random_forest(np.random.default_rng(seed), num_trees=4, max_length=40)


@pytest.fixture
def once():
    """A fresh compiler before the test and after it."""
    compiled.cache_clear()
    torch._dynamo.reset()
    yield
    compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
def test_forward_equals_dense_and_is_compiled_once(once):
    """Rows of several lengths, whole and in part, all after the first two without compiling."""
    num_compiled = []
    for seed, kind in enumerate(["whole", "compact", "whole", "compact", "whole", "compact"]):
        layout = long_forest(seed)
        rng = np.random.default_rng(seed)
        own = some_rows(layout, rng) if kind == "compact" else None
        held = needed_tokens(layout, own) if kind == "compact" else None
        plan = TreePlan(layout, "cpu", own, held)
        assert min(plan.num_queries, plan.num_keys) > BLOCK
        q, _, _, _ = random_heads(plan.num_queries, 4, 2, 16, seed=seed, dtype=torch.float32)
        _, k, v, _ = random_heads(plan.num_keys, 4, 2, 16, seed=9, dtype=torch.float32)
        q, k, v = (x.detach() for x in (q, k, v))
        with torch.no_grad():
            out = flex_tree_attention(q, k, v, plan_block_mask(plan), Scoring(0.25))
            expected = tree_attention(q, k, v, plan, backend="dense", scale=0.25)
        assert out.shape == expected.shape
        assert (out - expected).abs().max() <= 1e-5
        num_compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_compiled[1:] == num_compiled[1:2] * 5


def test_one_form_too_many_is_refused_and_never_computed_densely(once, monkeypatch):
    """Without C++: the graph is run as it was traced."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, **how, backend="eager"))
    monkeypatch.setattr(flex, "MAX_GRAPHS", 2)
    plan = TreePlan(TreeLayout.from_parents([150, 40], [-1, 0]), "cpu")

    def attend(dtype):
        q, k, v = (x.detach() for x in random_heads(190, 4, 2, 16, dtype=dtype)[:3])
        return flex_tree_attention(q, k, v, plan_block_mask(plan), Scoring(0.25))

    with torch._dynamo.config.patch(recompile_limit=1):
        attend(torch.float32)
        attend(torch.float64)
        with pytest.raises(RunError, match="compiled 2 forms .* attention_backend flash or path"):
            attend(torch.bfloat16)
        assert torch._dynamo.config.recompile_limit == 1
        attend(torch.float32)  # what is compiled goes on


@pytest.mark.parametrize(
    ("kind", "window", "softcap", "has_sinks"),
    [
        ("whole", 20, None, False),
        ("whole", None, 1.5, True),
        ("compact", 20, 1.5, True),
        ("compact", 1, None, True),
    ],
)
def test_windows_soft_caps_and_sinks(once, monkeypatch, kind, window, softcap, has_sinks):
    """In float64, without C++: the graph is run as it was traced."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, **how, backend="eager"))
    layout = long_forest(3)
    own = some_rows(layout, np.random.default_rng(3)) if kind == "compact" else None
    held = needed_tokens(layout, own, window) if kind == "compact" else None
    plan = TreePlan(layout, "cpu", own, held).windowed(window)
    q, _, _, _ = random_heads(plan.num_queries, 4, 2, 16)
    _, k, v, _ = random_heads(plan.num_keys, 4, 2, 16, seed=9)
    q, k, v = (x.detach() for x in (q, k, v))
    sinks = torch.linspace(-1, 2, 4, dtype=torch.float64) if has_sinks else None
    with torch.no_grad():
        scoring = Scoring(0.25, softcap, sinks)
        out = flex_tree_attention(q, k, v, plan_block_mask(plan), scoring)
        expected = tree_attention(q, k, v, plan, "dense", 0.25, softcap=softcap, sinks=sinks)
    assert (out - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [
        pytest.param(None, None, False, marks=pytest.mark.slow),
        pytest.param(None, 1.5, False, marks=pytest.mark.slow),
        (20, 1.5, True),
    ],
)
def test_gradients(once, monkeypatch, window, softcap, has_sinks):
    """In float64, by the operations that define torch's backward pass, which CPU has no kernel for.
    torch refuses gradients on CPU, and does not look where this test runs."""
    from torch.nn.attention import flex_attention as module

    if not hasattr(module, "_validate_device"):
        pytest.skip("this torch refuses gradients on CPU elsewhere")
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, **how, backend="aot_eager"))
    plan = TreePlan(long_forest(3), "cpu").windowed(window)
    *inputs, grad = random_heads(plan.num_queries, 4, 2, 16)
    if has_sinks:
        inputs.append(torch.linspace(-1, 2, 4, dtype=torch.float64).requires_grad_())

    def gradients(attend) -> tuple[torch.Tensor, ...]:
        out = attend(*inputs[:3], *(inputs[3:] or [None]))
        return out, *torch.autograd.grad(out, inputs, grad)

    mask = plan_block_mask(plan)
    actual = gradients(
        lambda q, k, v, sinks: flex_tree_attention(q, k, v, mask, Scoring(0.25, softcap, sinks))
    )
    expected = gradients(
        lambda q, k, v, sinks: tree_attention(
            q, k, v, plan, "dense", 0.25, softcap=softcap, sinks=sinks
        )
    )
    for own, dense in zip(actual, expected, strict=True):
        assert (own - dense).abs().max() <= 1e-12


def test_empty_row_and_training_on_cpu():
    layout = TreeLayout.concat([])
    q, k, v, _ = random_heads(0)
    assert flex_tree_attention(q, k, v, None, Scoring(1.0)).shape == (0, 4, 8)
    with pytest.raises(ValueError, match="on CPU FlexAttention has no backward pass; use .* path"):
        tree_attention(q, k, v, layout, backend="flex")
