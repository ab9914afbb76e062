"""Sliding windows, soft caps and sinks on trees, in float64: every engine against dense, dense
against transformers, and windows against a walk up the parents.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import stand_in_flash, stand_in_te
from test_partial_plans import some_rows
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from megatron_prefix.attention import TreePlan, tree_attention
from megatron_prefix.attention.api import resolve_backend
from megatron_prefix.attention.backends import path
from megatron_prefix.attention.backends.backend import Scoring, load_backend
from megatron_prefix.attention.backends.dense import masked_attention, visibility
from megatron_prefix.attention.backends.flex import BLOCK, block_mask, depth_bounds, plan_block_mask
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.attention.plan import build_path_plan
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, random_heads, visibility_by_walking

EXACT = 1e-12
WINDOWS = [1, 2, 3, 5, 9, 40]
"""Shorter and longer than the prompts of up to 6 tokens, and than all paths."""
HEADS = [(4, 4), (4, 2), (6, 1)]


def depths_by_walking(layout) -> np.ndarray:
    """Tokens above each token on its root path, counted as visible keys."""
    return visibility_by_walking(layout.lengths, layout.parents).sum(1) - 1


def seen_by_walking(layout, window) -> np.ndarray:
    """bool [T, T] from the definition: the last `window` tokens of each root path."""
    visible, depths = (
        visibility_by_walking(layout.lengths, layout.parents),
        depths_by_walking(layout),
    )
    return visible & (depths[:, None] - depths[None] < window)


def results(attention, inputs, grad):
    """(out, and the gradient of every input) of `attention(*inputs)`."""
    out = attention(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad))


def worst(actual, expected) -> float:
    return max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True))


def case(seed, heads, **more):
    layout = random_forest(np.random.default_rng(seed), **more)
    q, k, v, grad = random_heads(layout.num_tokens, *heads, seed=seed)
    sinks = torch.randn(heads[0], dtype=torch.float64, requires_grad=True)
    return layout, (q, k, v, sinks), grad


def path_engine(layout, window, softcap, has_sinks):
    return lambda q, k, v, sinks: tree_attention(
        q, k, v, layout, backend="path", window=window, softcap=softcap, sinks=sinks
    )


def flash_engine(layout, window, softcap, has_sinks):
    return lambda q, k, v, sinks: stand_in_flash(layout, window=window, sinks=sinks)(q, k, v)


def te_engine(layout, window, softcap, has_sinks):
    return lambda q, k, v, sinks: stand_in_te(layout, window=window, sinks=sinks)(q, k, v)


ENGINES = {"path": path_engine, "flash": flash_engine, "te": te_engine}
COMPUTED = [
    (engine, softcap, has_sinks)
    for engine in ENGINES
    for softcap, has_sinks in [(None, False), (1.5, False), (None, True), (1.5, True)]
    if not (softcap and "softcap" in load_backend(engine).lacks)
    and not (has_sinks and "sinks" in load_backend(engine).lacks)
]
"""What each backend computes; the rest it refuses by name."""


@pytest.mark.parametrize(("engine", "softcap", "has_sinks"), COMPUTED)
@pytest.mark.parametrize("seed", range(6))
def test_engines_equal_dense(engine, softcap, has_sinks, seed):
    """`te` and `flash` with the stand-ins of their kernels."""
    layout, (q, k, v, sinks), grad = case(seed, HEADS[seed % 3])
    inputs = (q, k, v, sinks) if has_sinks else (q, k, v)
    for window in [*WINDOWS, None]:

        def call(attention):
            return results(lambda *x: attention(*x, *[None] * (4 - len(x))), inputs, grad)

        expected = call(
            lambda q, k, v, s, w=window: tree_attention(
                q, k, v, layout, backend="dense", window=w, softcap=softcap, sinks=s
            )
        )
        actual = call(ENGINES[engine](layout, window, softcap, has_sinks))
        assert worst(actual, expected) <= EXACT, window


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", WINDOWS)
def test_dense_sees_what_a_walk_sees(seed, window):
    layout = random_forest(np.random.default_rng(seed))
    walked = seen_by_walking(layout, window)
    assert np.array_equal(visibility(layout, "cpu", window).numpy(), walked)
    assert layout.area(window) == walked.sum()


def test_a_window_counted_in_tokens_of_the_row_is_wrong():
    """The negative control: siblings lie between a response and its prompt in the row."""
    layout = TreeLayout.from_parents([6, 4, 5], [-1, 0, 0])
    q, k, v, grad = random_heads(layout.num_tokens)
    rows = torch.arange(layout.num_tokens)
    by_row = visibility(layout, "cpu") & (rows[:, None] - rows[None] < 7)
    wrong = results(lambda *x: masked_attention(*x, by_row, 8**-0.5), (q, k, v), grad)
    for backend in ("dense", "path"):
        right = results(
            lambda *x, b=backend: tree_attention(*x, layout, backend=b, window=7), (q, k, v), grad
        )
        assert torch.allclose(right[0][:10], wrong[0][:10], atol=EXACT)  # the row's first path
        assert (right[0][10:] - wrong[0][10:]).abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["dense", "path"])
def test_each_root_path_alone_is_windowed_causal_attention(backend):
    layout, (q, k, v, _), _ = case(7, (4, 4))
    out = tree_attention(q, k, v, layout, backend=backend, window=5)
    walked = visibility_by_walking(layout.lengths, layout.parents)
    for last in (layout.starts + layout.lengths - 1)[layout.leaf_mask]:
        rows = torch.from_numpy(np.flatnonzero(walked[last]))
        position = torch.arange(len(rows))
        distance = position[:, None] - position[None]
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1)[None] for x in (q, k, v)),
            attn_mask=(distance >= 0) & (distance < 5),
        )[0].transpose(0, 1)
        assert (alone - out[rows]).abs().max() <= EXACT


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_long_pieces_are_computed_in_chunks(seed, softcap):
    """Windows above and below the size of a chunk, pieces of several chunks, ancestors in runs."""
    layout = TreeLayout.from_parents([700, 90, 300, 5, 1300, 40], [-1, 0, 0, 2, 2, 0])
    q, k, v, grad = random_heads(layout.num_tokens, 2, 1, seed=seed)
    window = [17, 130, 900][seed]
    assert [17 < path.LEAST_CHUNK, 130 > path.LEAST_CHUNK, 900 > path.MOST_CHUNK] == [True] * 3
    expected, actual = (
        results(
            lambda *x, b=b: tree_attention(*x, layout, backend=b, window=window, softcap=softcap),
            (q, k, v),
            grad,
        )
        for b in ("dense", "path")
    )
    assert worst(actual, expected) <= EXACT


@pytest.mark.parametrize("is_compact", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_some_queries_equal_their_rows_of_the_whole(seed, is_compact):
    rng = np.random.default_rng(seed)
    layout = random_forest(rng)
    own, window = some_rows(layout, rng), WINDOWS[seed % len(WINDOWS)]
    held = needed_tokens(layout, own, window)
    assert np.array_equal(held, np.flatnonzero(seen_by_walking(layout, window)[own].any(0)))
    q, k, v, grad = random_heads(layout.num_tokens, 4, 2, seed=seed)
    only_own = torch.zeros_like(grad)
    only_own[own] = grad[own]
    whole = results(
        lambda *x: tree_attention(*x, layout, backend="dense", window=window), (q, k, v), only_own
    )
    kept = held if is_compact else np.arange(layout.num_tokens)
    expected = (whole[0][own], whole[1][own], whole[2][kept], whole[3][kept])
    rows = (own, held) if is_compact else (own,)
    parts = [x.detach()[i].requires_grad_() for x, i in ((q, own), (k, kept), (v, kept))]
    plan = TreePlan(layout, "cpu", *rows, *([None] if not is_compact else []), window)
    for engine in (
        lambda *x: tree_attention(*x, plan, backend="dense"),
        lambda *x: tree_attention(*x, plan, backend="path"),
        stand_in_flash(layout, *rows, window=window),
        stand_in_te(layout, *rows, window=window),
    ):
        assert worst(results(engine, parts, grad[own]), expected) <= EXACT


@st.composite
def forests(draw):
    """Segments of 1 to 5 tokens; each hangs on the last one or on one of its ancestors, or is a
    root."""
    parents: list[int] = []
    for segment in range(draw(st.integers(1, 9))):
        path, node = [-1], segment - 1
        while node >= 0:
            path.append(node)
            node = parents[node]
        parents.append(draw(st.sampled_from(path)))
    lengths = draw(st.lists(st.integers(1, 5), min_size=len(parents), max_size=len(parents)))
    return TreeLayout.from_parents(lengths, parents)


@given(layout=forests(), window=st.integers(1, 20), data=st.data())
@settings(max_examples=150, deadline=None)
def test_plans_hold_and_see_exactly_the_window(layout, window, data):
    """Some queries of a row: the keys that are held, and those that each query sees."""
    seen = seen_by_walking(layout, window)
    assert layout.area(window) == seen.sum()
    tokens = st.lists(st.booleans(), min_size=layout.num_tokens, max_size=layout.num_tokens)
    own = np.flatnonzero(data.draw(tokens))
    held = needed_tokens(layout, own, window)
    assert held.tolist() == np.flatnonzero(seen[own].any(0)).tolist()
    plan = build_path_plan(layout, "cpu", own, held, window)
    queries, keys = iter(own.tolist()), held[plan.kv_index.numpy()].tolist()
    for num_queries, num_keys in zip(plan.q_lengths, plan.kv_lengths, strict=True):
        piece, keys = keys[:num_keys], keys[num_keys:]
        for last in range(num_keys - num_queries, num_keys):
            visible = piece[: last + 1][-window:]
            assert visible == np.flatnonzero(seen[next(queries)]).tolist()
    assert next(queries, None) is None and not keys


def test_plan_of_the_worked_example():
    layout = TreeLayout.from_parents([3, 2, 4], [-1, 0, 0])
    plan = build_path_plan(layout, "cpu", window=2)
    assert (plan.q_lengths, plan.kv_lengths, plan.window) == ([5, 4], [5, 5], 2)
    assert plan.kv_index.tolist() == [0, 1, 2, 3, 4, 2, 5, 6, 7, 8]
    assert plan.gather_factor == 10 / 9


def test_a_plan_is_made_once_for_each_window():
    plan = TreePlan(TreeLayout.from_parents([3, 2, 4], [-1, 0, 0]), "cpu")
    assert plan.windowed(None) is plan.windowed(7) is plan
    assert plan.windowed(6) is plan.windowed(6) is not plan
    assert plan.windowed(6).windowed(6) is plan.windowed(6)


def gemma_attention(q, k, v, mask, softcap):
    return modeling_gemma2.eager_attention_forward(
        SimpleNamespace(num_key_value_groups=q.size(1) // k.size(1), head_dim=8, training=False),
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        mask,
        softcap=softcap,
    )[0][0]


def oss_attention(q, k, v, mask, sinks):
    return modeling_gpt_oss.eager_attention_forward(
        SimpleNamespace(num_key_value_groups=q.size(1) // k.size(1), sinks=sinks, training=False),
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        mask,
        scaling=8**-0.5,
    )[0][0]


def test_soft_caps_and_sinks_are_those_of_transformers():
    """Of one chain, with a window of 6. transformers computes softmax of Gemma 2 in float32."""
    layout = TreeLayout.from_parents([20], [-1])
    q, k, v, grad = random_heads(20, 4, 2, seed=1)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(20, 20, dtype=torch.float64)
    mask.masked_fill_(~visibility(layout, "cpu", 6), float("-inf"))
    theirs = gemma_attention(q, k, v, mask, 1.5)
    ours = tree_attention(q, k, v, layout, backend="dense", window=6, softcap=1.5)
    assert (theirs - ours).abs().max() < 1e-6
    theirs = results(lambda *x: oss_attention(*x[:3], mask, x[3]), (q, k, v, sinks), grad)
    ours = results(
        lambda *x: tree_attention(*x[:3], layout, backend="dense", window=6, sinks=x[3]),
        (q, k, v, sinks),
        grad,
    )
    assert worst(ours, theirs) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    layout, (q, k, v, sinks), grad = case(3, (4, 2))
    settings = {"window": 4, "softcap": 3.0}
    exact = results(
        lambda *x: tree_attention(*x[:3], layout, backend="dense", sinks=x[3], **settings),
        (q, k, v, sinks),
        grad,
    )
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, sinks)]
    for backend in ("dense", "path"):
        rounded = results(
            lambda *x, b=backend: tree_attention(*x[:3], layout, backend=b, sinks=x[3], **settings),
            low,
            grad.to(dtype),
        )
        assert all(x.dtype == dtype for x in rounded)
        tolerance = 10 * torch.finfo(dtype).eps * max(float(x.abs().max()) for x in exact)
        assert worst([x.double() for x in rounded], exact) < tolerance


@pytest.mark.parametrize("backend", ["dense", "path"])
def test_empty_row(backend):
    q, k, v, grad = random_heads(0)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    layout = TreeLayout.concat([])
    grads = results(
        lambda *x: tree_attention(
            *x[:3], layout, backend=backend, window=2, softcap=2.0, sinks=x[3]
        ),
        (q, k, v, sinks),
        grad,
    )
    assert grads[0].shape == (0, 4, 8) and not grads[4].any()
    for stand_in in (stand_in_flash, stand_in_te):
        out = stand_in(layout, sinks=sinks)(q, k, v)
        assert not torch.autograd.grad(out.sum(), sinks)[0].any()


def test_what_a_backend_lacks_is_refused():
    for name, feature in (("flash", "softcap"), ("te", "softcap")):
        with pytest.raises(ValueError, match=f"{name} cannot be used: .* attention_backend fl"):
            resolve_backend(name, "cuda", torch.bfloat16, 64, features=[feature])
    assert resolve_backend("auto", "cpu", torch.float32, features=["softcap", "sinks"]) == "path"
    layout = TreeLayout.from_parents([3], [-1])
    q, k, v, _ = random_heads(3)
    for wrong, message in (
        ({"window": 0}, "window is 0: .* at least itself"),
        ({"softcap": -1.0}, "softcap is -1.0: give a positive number"),
        ({"sinks": torch.zeros(3)}, r"one number per query head, shape \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_attention(q, k, v, layout, **wrong)
    with pytest.raises(ValueError, match="window is 2, but the plan was built for 1"):
        tree_attention(q, k, v, TreePlan(layout, "cpu", window=1), window=2)


@pytest.mark.parametrize("kind", ["whole", "some_queries", "compact"])
@pytest.mark.parametrize("seed", range(12))
def test_block_masks_of_flex(seed, kind):
    """Every pair that is seen is in a listed block, whole blocks are seen whole, and blocks out of
    the window's reach are not listed."""
    rng = np.random.default_rng(seed)
    layout = random_forest(rng, num_trees=2, max_length=12)
    window = WINDOWS[seed % len(WINDOWS)]
    seen = seen_by_walking(layout, window)
    own = None if kind == "whole" else some_rows(layout, rng)
    held = needed_tokens(layout, own, window) if kind == "compact" else None
    seen = seen if own is None else seen[own]
    seen = seen if held is None else seen[:, held]
    mask = block_mask(layout, torch.device("cpu"), own, held, block=8, window=window)
    pairs = [torch.arange(n) for n in seen.shape]
    by_pair = mask.mask_mod(None, None, pairs[0][:, None], pairs[1][None])
    assert np.array_equal(by_pair.numpy(), seen)
    shape = [-(-n // 8) * 8 for n in seen.shape]
    padded = np.zeros(shape, bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    blocks = padded.reshape(shape[0] // 8, 8, shape[1] // 8, 8)
    some, whole = blocks.any((1, 3)), blocks.all((1, 3))
    part = listed(mask.kv_num_blocks, mask.kv_indices, some.shape)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, some.shape)
    assert not (part & full).any() and not (some & ~(part | full)).any()
    assert not (full & ~whole).any()


def listed(counts, indices, shape) -> np.ndarray:
    blocks = np.zeros(shape, bool)
    for row, (count, columns) in enumerate(
        zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    ):
        blocks[row, columns[:count]] = True
    return blocks


def test_flex_skips_the_blocks_before_the_window():
    """A chain of 64 blocks and a window of one block: two blocks a query block, not 64."""
    layout = TreeLayout.from_parents([64 * BLOCK], [-1])
    plan = TreePlan(layout, "cpu").windowed(BLOCK)
    mask = plan_block_mask(plan)
    assert (mask.kv_num_blocks + mask.full_kv_num_blocks).max() == 2
    assert depth_bounds(np.array([0, 1, 2, 3, 4, 3, 4, 5, 6], np.int32), 4).tolist() == [
        [0, 3, 6],
        [3, 5, 6],
    ]


def test_scoring_without_settings_is_plain():
    assert Scoring(0.5) == (0.5, None, None, False)
