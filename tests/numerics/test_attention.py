"""Tree attention in float64: every backend against the dense specification, and it against sense.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

import numpy as np
import pytest
import torch
from stand_ins import stand_in_flash, stand_in_te, varlen_backward, varlen_forward

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.api import resolve_backend
from megatron_prefix.attention.backends import Scoring
from megatron_prefix.attention.backends.dense import masked_attention, visibility
from megatron_prefix.attention.backends.flash import Operators, flash_attention, why_not_head_dim
from megatron_prefix.attention.backends.path import CPU_FLASH, PLAIN, PLAIN_BLOCK, _PathAttention
from megatron_prefix.attention.plan import build_path_plan
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import (
    random_forest,
    random_heads,
    random_tree,
    visibility_by_walking,
)

EXACT = 1e-12
HEADS = [(4, 4), (4, 2), (6, 1)]


def forward_backward(attention, q, k, v, grad_out):
    """(out, dq, dk, dv) of `attention(q, k, v)`."""
    out = attention(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), grad_out))


def assert_close(actual, expected, tolerance=EXACT):
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.shape == e.shape, name
        error = (a - e).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance, f"{name} differs by {error}"


def path_with(kernel):
    def engine(layout, *rows):
        plan = build_path_plan(layout, "cpu", *rows)

        def attention(q, k, v):
            scoring = Scoring(q.size(-1) ** -0.5)
            return _PathAttention.apply(q, k, v, None, plan, scoring, kernel)

        return attention

    return engine


ENGINES = {
    "path": path_with(CPU_FLASH),
    "path_plain": path_with(PLAIN),
    "flash_bookkeeping": stand_in_flash,
    "te_bookkeeping": stand_in_te,
}


def dense_of(layout):
    return lambda q, k, v: tree_attention(q, k, v, layout, backend="dense")


def check_engine(engine, layout, heads, seed):
    inputs = random_heads(layout.num_tokens, *heads, seed=seed)
    expected = forward_backward(dense_of(layout), *inputs)
    assert_close(forward_backward(ENGINES[engine](layout), *inputs), expected)


def test_dense_sees_what_a_walk_up_the_parents_sees():
    for seed in range(20):
        layout = random_forest(np.random.default_rng(seed))
        walked = visibility_by_walking(layout.lengths, layout.parents)
        assert np.array_equal(visibility(layout, "cpu").numpy(), walked)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seed", range(10))
def test_engines_equal_dense_on_random_forests(engine, heads, seed):
    check_engine(engine, random_forest(np.random.default_rng(seed)), heads, seed)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ([1], [-1]),
        ([1] * 7, [-1, 0, 1, 1, 0, 4, -1]),
        ([5, 3, 4, 6], [-1, 0, 1, 2]),
        ([5, 1, 4], [-1, -1, -1]),
        ([9] + [2] * 8, [-1] + [0] * 8),
        ([4, 3, 3, 2, 2, 5, 2], [-1, 0, 0, 2, 2, 0, 5]),
        ([3, 2, 4, 17], [-1, 0, 0, -1]),
    ],
    ids=["token", "tokens", "chain", "roots", "eight", "prefix_response", "padding"],
)
def test_engines_equal_dense_on_special_shapes(engine, lengths, parents):
    check_engine(engine, TreeLayout.from_parents(lengths, parents), (4, 2), seed=3)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_equal_dense_on_many_packed_trees(engine):
    rng = np.random.default_rng(5)
    layout = random_forest(rng, num_trees=25, max_depth=3, max_children=3, max_length=9)
    check_engine(engine, layout, (4, 2), seed=5)


def test_engines_take_sizes_beyond_one_kernel_block():
    layout = TreeLayout.from_parents([PLAIN_BLOCK + 76, 70, 41, 33], [-1, 0, 0, 2])
    for engine in ENGINES:
        check_engine(engine, layout, (2, 1), seed=1)


@pytest.mark.parametrize("backend", ["dense", "path"])
def test_empty_row(backend):
    q, k, v, grad_out = random_heads(0)
    layout = TreeLayout.concat([])
    results = forward_backward(
        lambda *x: tree_attention(*x, layout, backend=backend), q, k, v, grad_out
    )
    assert [tuple(x.shape) for x in results] == [(0, 4, 8), (0, 4, 8), (0, 2, 8), (0, 2, 8)]
    check_engine("flash_bookkeeping", layout, (4, 2), seed=0)


def test_scale_and_low_precision():
    layout = random_forest(np.random.default_rng(1))
    exact = random_heads(layout.num_tokens, seed=1)

    def run(inputs, backend):
        return forward_backward(
            lambda *x: tree_attention(*x, layout, backend=backend, scale=0.7), *inputs
        )

    expected = run(exact, "dense")
    assert_close(run(exact, "path"), expected)
    assert (expected[0] - dense_of(layout)(*exact[:3])).abs().max() > 1e-2
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-1)):
        low = random_heads(layout.num_tokens, seed=1, dtype=dtype)
        results = run(low, "path")
        assert all(x.dtype == dtype for x in results)
        assert_close([x.double() for x in results], expected, tolerance)


def test_strided_inputs_and_gradients():
    layout = random_forest(np.random.default_rng(2))
    torch.manual_seed(0)
    mixed = torch.randn(layout.num_tokens, 4, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, layout.num_tokens, 8, dtype=torch.float64).transpose(0, 1)
    grads = {}
    for backend in ("dense", "path"):
        out = tree_attention(*mixed.split(8, dim=-1), layout, backend=backend)
        (grads[backend],) = torch.autograd.grad((out * weight).sum(), mixed)
    assert (grads["dense"] - grads["path"]).abs().max() <= EXACT


def permuted(lengths, order):
    """Rows of [prompt, responses ...] with the responses in another order."""
    ends = np.cumsum(lengths)
    rows = [np.arange(lengths[0])]
    rows += [np.arange(ends[1 + i] - lengths[1 + i], ends[1 + i]) for i in order]
    return torch.from_numpy(np.concatenate(rows))


@pytest.mark.parametrize("backend", ["dense", "path"])
def test_permuting_siblings_changes_nothing(backend):
    lengths, order = [7, 3, 5, 1, 4], [2, 0, 3, 1]
    rows = permuted(lengths, order)
    parents = [-1, 0, 0, 0, 0]
    layout = TreeLayout.from_parents(lengths, parents)
    other = TreeLayout.from_parents([7] + [lengths[1 + i] for i in order], parents)
    inputs = random_heads(layout.num_tokens)
    moved = [x.detach()[rows].requires_grad_() for x in inputs]
    expected = forward_backward(lambda *x: tree_attention(*x, layout, backend=backend), *inputs)
    results = forward_backward(lambda *x: tree_attention(*x, other, backend=backend), *moved)
    assert_close(results, [x[rows] for x in expected])


@pytest.mark.parametrize("backend", ["dense", "path"])
def test_changing_one_response_leaves_the_others_bit_identical(backend):
    layout = TreeLayout.from_parents([6, 4, 5, 3], [-1, 0, 0, 0])
    changed = slice(6, 10)
    q, k, v, _ = (x.detach() for x in random_heads(layout.num_tokens))
    before = tree_attention(q, k, v, layout, backend=backend)
    for x in (q, k, v):
        x[changed] = 3.0 * x[changed] - 1.0
    after = tree_attention(q, k, v, layout, backend=backend)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[10:], after[10:])
    assert (before[changed] - after[changed]).abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["dense", "path"])
def test_a_tree_beside_others_equals_itself_alone(backend):
    rng = np.random.default_rng(11)
    trees = [random_tree(rng) for _ in range(4)]
    row = TreeLayout.concat(trees)
    inputs = random_heads(row.num_tokens)
    packed = forward_backward(lambda *x: tree_attention(*x, row, backend=backend), *inputs)
    begin = 0
    for tree in trees:
        rows = slice(begin, begin := begin + tree.num_tokens)
        own = [x.detach()[rows].requires_grad_() for x in inputs]
        attention = lambda *x, tree=tree: tree_attention(*x, tree, backend=backend)  # noqa: E731
        assert_close(forward_backward(attention, *own), [x[rows] for x in packed])


@pytest.mark.parametrize("backend", ["dense", "path"])
@pytest.mark.parametrize("seed", range(5))
def test_each_root_path_alone_is_plain_causal_attention(backend, seed):
    layout = random_tree(np.random.default_rng(100 + seed))
    q, k, v, grad_out = random_heads(layout.num_tokens, 4, 4, seed=seed)
    walked = visibility_by_walking(layout.lengths, layout.parents)
    out = tree_attention(q, k, v, layout, backend=backend)
    last_rows = (layout.starts + layout.lengths - 1)[layout.leaf_mask]
    loss_of_paths = 0.0
    for last_row in last_rows:
        rows = torch.from_numpy(np.flatnonzero(walked[last_row]))
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True
        )[0].transpose(0, 1)
        assert (alone - out[rows]).abs().max() <= EXACT
        loss_of_paths = loss_of_paths + (alone * grad_out[rows]).sum()
    # A token shared by n paths counts n times in their sum, so weigh it so in the tree, too.
    num_paths = torch.from_numpy(walked[last_rows].sum(0))[:, None, None]
    of_tree = torch.autograd.grad(out, (q, k, v), grad_out * num_paths)
    for a, e in zip(of_tree, torch.autograd.grad(loss_of_paths, (q, k, v)), strict=True):
        assert (a - e).abs().max() <= EXACT


def test_a_leaky_mask_is_detected():
    layout = TreeLayout.from_parents([6, 4, 5], [-1, 0, 0])
    q, k, v, grad_out = random_heads(layout.num_tokens)
    leaky = torch.ones(15, 15, dtype=torch.bool).tril()
    leaked = forward_backward(
        lambda *x: masked_attention(*x, leaky, q.size(-1) ** -0.5), q, k, v, grad_out
    )
    right = forward_backward(
        lambda *x: tree_attention(*x, layout, backend="path"), q, k, v, grad_out
    )
    assert torch.equal(leaked[0][:10], dense_of(layout)(q, k, v)[:10])
    for a, e in zip(leaked, right, strict=True):
        assert (a - e).abs().max() > 1e-2


def test_plan_of_the_worked_example():
    plan = build_path_plan(TreeLayout.from_parents([3, 2, 4], [-1, 0, 0]), "cpu")
    assert (plan.q_lengths, plan.kv_lengths) == ([5, 4], [5, 7])
    assert (plan.max_seqlen_q, plan.max_seqlen_kv) == (5, 7)
    assert plan.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert plan.cu_seqlens_q.tolist() == [0, 5, 9]
    assert plan.cu_seqlens_kv.tolist() == [0, 5, 12]
    assert plan.cu_seqlens_q.dtype == plan.cu_seqlens_kv.dtype == torch.int32
    assert plan.copy_offsets.tolist() == [0, 2, 4, 6, 7, 8, 9, 10, 11, 12]
    assert plan.copy_order[:4].tolist() == [0, 5, 1, 6]
    assert plan.gather_factor == 12 / 9 and not plan.is_identity
    assert plan.ancestor_starts == [0, 0]


@pytest.mark.parametrize("seed", range(30))
def test_plan_invariants_and_copy_sum(seed):
    layout = random_forest(np.random.default_rng(seed))
    plan = build_path_plan(layout, "cpu")
    torch.manual_seed(seed)
    assert sum(plan.q_lengths) == layout.num_tokens
    area = sum(
        q * (kv - q) + q * (q + 1) // 2
        for q, kv in zip(plan.q_lengths, plan.kv_lengths, strict=True)
    )
    assert area == layout.area()
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.bfloat16, 2e-2)):
        copies = torch.randn(len(plan.kv_index), 2, 3, dtype=torch.float64).to(dtype)
        expected = torch.zeros(layout.num_tokens, 2, 3, dtype=torch.float64)
        expected.index_add_(0, plan.kv_index, copies.double())
        sums = plan.sum_copies(copies)
        assert sums.dtype == dtype and torch.equal(sums, plan.sum_copies(copies))
        assert ((sums.double() - expected).abs() <= tolerance * (1 + expected.abs())).all()


def test_copies_are_summed_in_float32():
    layout = TreeLayout.from_parents([1] + [1] * 8, [-1] + [0] * 8)
    plan = build_path_plan(layout, "cpu")
    copies = torch.full((len(plan.kv_index), 1, 1), 1 / 256, dtype=torch.bfloat16)
    copies[0] = 1.0  # the root's first copy; added one by one, bfloat16 would stay at 1
    assert plan.sum_copies(copies)[0].item() == torch.tensor(1 + 7 / 256).bfloat16().item() > 1.0


def test_chains_need_no_gather():
    layout = TreeLayout.from_parents([4, 3, 5], [-1, 0, -1])
    plan = build_path_plan(layout, "cpu")
    rows = torch.arange(72.0).view(12, 2, 3)
    assert plan.is_identity and plan.gather_factor == 1.0
    assert plan.gather(rows) is rows and plan.sum_copies(rows) is rows
    assert plan.kv_index.tolist() == list(range(12))


def test_flash_launch_bound_avoids_the_decoding_route():
    seen = []

    def forward(*args, **kwargs):
        seen.append(args[5])
        return varlen_forward(*args, **kwargs)

    layout = TreeLayout.from_parents([1, 1], [-1, -1])
    q, k, v, _ = random_heads(2)
    plan = build_path_plan(layout, "cpu")
    flash_attention(q, k, v, plan, Scoring(1.0), Operators(forward, varlen_backward))
    assert plan.max_seqlen_q == 1 and seen == [2]


def test_tree_plan_is_built_once():
    plan = TreePlan(TreeLayout.from_parents([3, 2, 4], [-1, 0, 0]), "cpu")
    assert plan.path is plan.path
    q, k, v, _ = random_heads(9)
    shared = tree_attention(q, k, v, plan)
    assert torch.equal(shared, tree_attention(q, k, v, plan.layout))


def test_backends_are_resolved():
    assert resolve_backend("auto", "cpu", torch.bfloat16) == "path"
    assert resolve_backend("auto", "cpu", torch.float64) == "path"
    assert resolve_backend("dense", "cuda", torch.float32) == "dense"
    assert resolve_backend("path", "cuda", torch.bfloat16) == "path"
    with pytest.raises(ValueError, match="'fast' is unknown; use one of auto, dense"):
        resolve_backend("fast", "cpu", torch.float32)
    with pytest.raises(ValueError, match="runs on CUDA, not on cpu; use .* path"):
        resolve_backend("flash", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="not in torch.float32; set dtype to bfloat16"):
        resolve_backend("flash", "cuda", torch.float32)
    with pytest.raises(ValueError, match="floating point"):
        resolve_backend("dense", "cpu", torch.int64)
    for head_dim, version in ((12, 2), (264, 3), (192, 4)):
        assert f"got {head_dim}; use attention_backend path" in why_not_head_dim(head_dim, version)
    assert why_not_head_dim(192) is None
    with pytest.raises(ValueError, match="te cannot be used: it runs on CUDA, not on cpu"):
        resolve_backend("te", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="flex cannot be used: on CPU .* no backward pass"):
        resolve_backend("flex", "cpu", torch.float32)


def test_bad_arguments_are_named():
    layout = TreeLayout.from_parents([3, 2, 4], [-1, 0, 0])
    q, k, v, _ = (x.detach() for x in random_heads(9))
    for bad, message in [
        ((q[0], k, v, layout), "q needs shape"),
        ((q, k, v[:, :1], layout), "k and v"),
        ((q, k[:8], v[:8], layout), "which have 9 and 8"),
        ((q[:, :3], k, v, layout), "multiple of the key/value heads"),
        ((q, k, v.float(), layout), "one dtype"),
        ((q[:8], k[:8], v[:8], layout), "which have 8 and 8"),
        ((q, k, v, TreePlan(layout, "meta")), "built for meta"),
        ((q, k, v, None), "TreeLayout or TreePlan"),
    ]:
        with pytest.raises(ValueError, match=message):
            tree_attention(*bad)
