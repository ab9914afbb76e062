"""The layout's claims against walks over the tree that use none of its arithmetic."""

import numpy as np
import pytest

from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import random_forest, random_tree, visibility_by_walking

SEEDS = range(120)


def visible(layout: TreeLayout) -> np.ndarray:
    """bool [T, T] by the published rule `k <= q < subtree_end[k]`."""
    q = np.arange(layout.num_tokens)[:, None]
    k = np.arange(layout.num_tokens)[None, :]
    return (k <= q) & (q < layout.token_subtree_ends()[None, :])


def test_worked_example():
    layout = TreeLayout.from_parents([3, 2, 4], [-1, 0, 0])
    assert layout.starts.tolist() == [0, 3, 5]
    assert layout.subtree_ends.tolist() == [9, 5, 9]
    assert layout.first_positions.tolist() == [0, 3, 3]
    assert layout.token_subtree_ends().tolist() == [9, 9, 9, 5, 5, 9, 9, 9, 9]
    assert layout.position_ids().tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert layout.leaf_mask.tolist() == [False, True, True]
    assert (layout.num_segments, layout.num_tokens) == (3, 9)
    assert layout.area() == (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6 + 7)


def test_dtypes_and_read_only():
    layout = TreeLayout.from_parents([2, 1], [-1, 0])
    for name in ("starts", "lengths", "parents", "subtree_ends", "first_positions"):
        assert getattr(layout, name).dtype == np.int32
        with pytest.raises(ValueError):
            getattr(layout, name)[0] = 7
    assert layout.token_subtree_ends().dtype == np.int32
    assert layout.position_ids().dtype == np.int64


@pytest.mark.parametrize("seed", SEEDS)
def test_visibility_equals_a_walk_up_the_parents(seed):
    layout = random_forest(np.random.default_rng(seed))
    walked = visibility_by_walking(layout.lengths, layout.parents)
    assert np.array_equal(visible(layout), walked)
    assert layout.area() == walked.sum()
    # A token's position is the number of tokens before it on its root path.
    assert np.array_equal(layout.position_ids(), walked.sum(1) - 1)


def test_forests_of_the_tests_are_not_trivial():
    layouts = [random_forest(np.random.default_rng(seed)) for seed in SEEDS]
    children = [np.bincount(x.parents[x.parents >= 0]).max(initial=0) for x in layouts]
    assert max(children) == 8
    assert any((x.lengths == 1).any() for x in layouts)

    def depth(layout, segment):
        return 0 if segment == -1 else 1 + depth(layout, layout.parents[segment])

    assert max(depth(x, s) for x in layouts for s in range(x.num_segments)) == 5


@pytest.mark.parametrize("seed", range(20))
def test_concat_equals_one_layout_of_all_segments(seed):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng) for _ in range(4)]
    row = TreeLayout.concat(trees)
    shifts = np.cumsum([0] + [tree.num_segments for tree in trees])
    parents = [
        parent if parent < 0 else parent + shift
        for tree, shift in zip(trees, shifts, strict=False)
        for parent in tree.parents.tolist()
    ]
    whole = TreeLayout.from_parents(np.concatenate([t.lengths for t in trees]), parents)
    for name in ("starts", "lengths", "parents", "subtree_ends", "first_positions"):
        assert np.array_equal(getattr(row, name), getattr(whole, name)), name
        assert getattr(row, name).dtype == np.int32
    assert row.num_tokens == whole.num_tokens


@pytest.mark.parametrize("empty", [TreeLayout.from_parents([], []), TreeLayout.concat([])])
def test_empty_layouts(empty):
    assert (empty.num_tokens, empty.num_segments, empty.area()) == (0, 0, 0)
    assert empty.position_ids().shape == empty.token_subtree_ends().shape == (0,)
    assert empty.leaf_mask.shape == (0,)
    tree = TreeLayout.from_parents([2, 3], [-1, 0])
    row = TreeLayout.concat([empty, tree, empty])
    assert row.starts.tolist() == [0, 2] and row.num_tokens == 5


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([2, 0], [-1, 0], "segment 1 has length 0"),
        ([2, -3], [-1, 0], "segment 1 has length -3"),
        ([2, 2], [-1, 1], "segment 1 has parent 1"),
        ([2, 2], [1, -1], "segment 0 has parent 1"),
        ([2, 2], [-1, -2], "segment 1 has parent -2"),
        ([2, 2, 2, 2], [-1, 0, 0, 1], "segment 3 has parent 1, whose interval was closed"),
        ([2, 2, 2], [-1, -1, 0], "segment 2 has parent 0, whose interval was closed"),
        ([2, 2], [-1], "one entry per segment"),
        ([2**31 - 1, 1], [-1, 0], "2147483648 tokens"),
    ],
)
def test_bad_input_is_named(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        TreeLayout.from_parents(lengths, parents)
