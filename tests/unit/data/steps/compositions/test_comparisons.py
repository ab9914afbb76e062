"""Selections of pairs by levels of rank."""

import pickle

import numpy as np
import pytest
from data_sets import path, write

from megatron_prefix.data.steps.compositions import with_comparisons
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.data.tree import Pair, build_tree
from megatron_prefix.errors import InputError

RANKS = [[0, 1, 1, 2], [5, 3, 3], [1, 0]]
"""Ranks of three sets; the first two are of one group. The second one begins at rank 3."""


def all_pairs(ranks, first=0):
    return [
        (first + i, first + j)
        for i in range(len(ranks))
        for j in range(len(ranks))
        if ranks[i] < ranks[j]
    ]


def levels_of(ranks, kind):
    """The pairs of levels, by the definition."""
    levels = sorted(set(ranks))
    at = {"all": [(a, b) for a in levels for b in levels if a < b]}
    at["best_vs_rest"] = [(levels[0], b) for b in levels[1:]]
    at["best_vs_worst"] = [(levels[0], levels[-1])]
    at["adjacent"] = list(zip(levels, levels[1:], strict=False))
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if (a, b) in at[kind]]


@pytest.fixture
def dataset(tmp_path) -> PreferenceDataset:
    """Two groups; weights count the pairs."""
    trees, count = [], 0
    for sets in (RANKS[:2], RANKS[2:]):
        paths, pairs, first = [], [], 0
        for set_id, ranks in enumerate(sets):
            for i, rank in enumerate(ranks):
                tokens = [1, 2 + set_id, 10 + i]
                paths.append(path(tokens, 2, set_id=set_id, rank=rank))
            for chosen, rejected in all_pairs(ranks, first):
                count += 1
                numbers = {"weight": count, "margin": -count, "beta": 2 * count}
                pairs.append(Pair(chosen=chosen, rejected=rejected, **numbers))
            first += len(ranks)
        trees.append(build_tree(paths, pairs))
    write(tmp_path / "set", trees)
    return PreferenceDataset(tmp_path / "set")


@pytest.mark.parametrize("kind", ["all", "best_vs_rest", "best_vs_worst", "adjacent"])
def test_pairs_are_those_of_the_levels(dataset, kind):
    view = with_comparisons(dataset, kind)
    expected = [
        [*levels_of(RANKS[0], kind), *((4 + i, 4 + j) for i, j in levels_of(RANKS[1], kind))],
        levels_of(RANKS[2], kind),
    ]
    assert [sorted(map(tuple, tree.pairs.tolist())) for tree in map(view.__getitem__, (0, 1))] == [
        sorted(pairs) for pairs in expected
    ]
    assert view.group_pairs.tolist() == [0, len(expected[0]), len(expected[0]) + len(expected[1])]
    sides = map(tuple, dataset[0].pairs.tolist())
    whole = dict(zip(sides, dataset[0].pair_weights.tolist(), strict=True))
    tree = view[0]
    assert [whole[tuple(p)] for p in tree.pairs.tolist()] == tree.pair_weights.tolist()
    assert (tree.pair_margins == -tree.pair_weights).all()
    assert (tree.pair_betas == 2 * tree.pair_weights).all()
    assert np.array_equal(tree.tokens, dataset[0].tokens)
    assert view.fingerprint == dataset.fingerprint


def test_all_is_the_data_set_itself(dataset):
    assert with_comparisons(dataset, "all") is dataset
    assert pickle.loads(pickle.dumps(dataset)).prefix == dataset.prefix


def test_a_selection_is_not_pickled_as_the_whole(dataset):
    with pytest.raises(TypeError, match="with adjacent of its pairs cannot be pickled"):
        pickle.dumps(with_comparisons(dataset, "adjacent"))


def test_pairs_without_ranks_have_no_level(tmp_path):
    paths = [path([1, 2], 1), path([1, 3], 1)]
    ranked = [path([1, 2], 1, rank=0), path([1, 3], 1, rank=1)]
    pair = [Pair(chosen=0, rejected=1)]
    write(tmp_path / "set", [build_tree(ranked, pair), build_tree(paths, pair)])
    dataset = PreferenceDataset(tmp_path / "set")
    message = "1 of the 2 pairs .*first in group 1, record 1.*loss.comparisons: adjacent"
    with pytest.raises(InputError, match=message):
        with_comparisons(dataset, "adjacent")


def test_joined_data_sets_have_the_selection_of_each(dataset):
    joined = join_datasets([dataset, dataset])
    view, alone = with_comparisons(joined, "adjacent"), with_comparisons(dataset, "adjacent")
    count = len(alone.pair_weights)
    assert view.pair_weights.tolist() == alone.pair_weights.tolist() * 2
    assert view[3].pairs.tolist() == alone[1].pairs.tolist()
    assert view.group_pairs.tolist() == [*alone.group_pairs, *(alone.group_pairs[1:] + count)]
    assert view.whole is joined and view.fingerprint == joined.fingerprint
    first = len(dataset.pair_weights)
    assert view.pair_numbers.tolist() == [*alone.pair_numbers, *(alone.pair_numbers + first)]
