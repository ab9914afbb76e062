"""Every sharing mode runs the same responses: the same tokens before them, the same loss."""

import numpy as np
import pytest
from data_sets import VOCAB, path, random_group, three_responses

from megatron_prefix.data.steps.sharing import SHARING_MODES, all_bundles, bundles_of, view
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tree import Pair, build_tree

SEEDS = range(40)


@pytest.fixture(scope="module")
def groups():
    return [random_group(np.random.default_rng(seed)) for seed in SEEDS]


@pytest.fixture(scope="module")
def dataset(groups, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("sharing") / "random"
    with DatasetWriter(
        prefix, {"name": "seven", "vocab_size": VOCAB, "fingerprint": "7"}
    ) as writer:
        for record, (paths, pairs) in enumerate(groups):
            writer.add(build_tree(paths, pairs), record)
        writer.finish()
    return PreferenceDataset(prefix)


def check_view(part, paths, pairs):
    """A view's responses and pairs are the group's, by what was given to `build_tree`."""
    tree = part.tree
    for local, response in enumerate(part.responses):
        tokens, loss_start = tree.response_tokens(local)
        assert tokens.tolist() == paths[response].tokens.tolist()
        assert loss_start == paths[response].loss_start
        assert tree.response_sets[local] == paths[response].set_id
        assert tree.ranks[local] == paths[response].rank
        assert tree.scores[local] == paths[response].score
    assert tree.num_responses == len(part.responses)
    assert tree.num_pairs == len(part.pairs)
    for local, pair in enumerate(part.pairs):
        given = pairs[pair]
        assert part.responses[tree.pairs[local]].tolist() == [given.chosen, given.rejected]
        assert tree.pair_weights[local] == given.weight
        assert tree.pair_margins[local] == given.margin
        assert tree.pair_betas[local] == given.beta


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_every_response_keeps_its_whole_path_and_its_loss(dataset, groups, sharing):
    for group, (paths, pairs) in enumerate(groups):
        covered = []
        for bundle in bundles_of(dataset, group, sharing):
            part = view(dataset[group], sharing, bundle.item)
            check_view(part, paths, pairs)
            covered += part.pairs.tolist()
        assert sorted(covered) == list(range(len(pairs)))  # each pair in one bundle


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_bundle_lengths_from_the_columns_are_those_of_the_view(dataset, sharing):
    total = 0
    for group in range(len(dataset)):
        for bundle in bundles_of(dataset, group, sharing):
            assert bundle.group == group
            assert bundle.num_tokens == view(dataset[group], sharing, bundle.item).tree.num_tokens
            total += bundle.num_tokens
    assert total == dataset.manifest["tokens"][sharing]


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_all_bundles_are_those_of_every_group(dataset, sharing):
    one_by_one = [
        (bundle.group, bundle.item, bundle.num_tokens)
        for group in range(len(dataset))
        for bundle in bundles_of(dataset, group, sharing)
    ]
    columns = [column.tolist() for column in all_bundles(dataset, sharing)]
    assert list(zip(*columns, strict=True)) == one_by_one


def test_the_random_groups_are_not_trivial(groups, dataset):
    starts = [{p.loss_start for p in paths if p.set_id == 0} for paths, _ in groups]
    assert sum(len(s) > 1 for s in starts) >= 5
    tokens = dataset.manifest["tokens"]
    assert tokens["tree"] < tokens["pair"] < tokens["none"]
    assert tokens["response"] < tokens["none"]
    assert max(len(pairs) for _, pairs in groups) > 10


def nodes_of(part):
    tree = part.tree
    return [tree.node_tokens(i).tolist() for i in range(tree.num_nodes)], tree.parents.tolist()


def test_modes_by_hand():
    tree = three_responses()
    whole = view(tree, "tree", 0)
    assert whole.tree is tree
    assert whole.responses.tolist() == [0, 1, 2] and whole.pairs.tolist() == [0, 1]
    shared = view(tree, "pair", 1)
    assert nodes_of(shared) == ([[5, 6], [7], [7, 8]], [-1, 0, 0])
    assert shared.responses.tolist() == [2, 0] and shared.pairs.tolist() == [1]
    assert shared.tree.pairs.tolist() == [[0, 1]]
    assert (shared.tree.pair_weights.tolist(), shared.tree.pair_margins.tolist()) == ([0.5], [3.0])
    alone = view(tree, "response", 0)
    assert nodes_of(alone) == (
        [[5, 6], [7, 8], [5, 6], [7, 9, 2], [5, 6], [7]],
        [-1, 0, -1, 2, -1, 4],
    )
    assert alone.tree.pairs.tolist() == [[0, 1], [2, 0]]
    nothing = view(tree, "none", 0)
    assert nodes_of(nothing) == ([[5, 6], [7, 8], [5, 6], [7, 9, 2]], [-1, 0, -1, 2])
    assert nothing.tree.pairs.tolist() == [[0, 1]]


def test_response_mode_bundles_one_comparison_set():
    paths = [path([1, 2], 1), path([1, 3], 1)]
    paths += [path([1, 2, 4, 5], 3, set_id=3), path([1, 2, 4, 6], 3, set_id=3)]
    tree = build_tree(paths, [Pair(chosen=1, rejected=0), Pair(chosen=2, rejected=3)])
    second = view(tree, "response", 3)
    assert second.responses.tolist() == [2, 3] and second.pairs.tolist() == [1]
    assert nodes_of(second) == ([[1, 2, 4], [5], [1, 2, 4], [6]], [-1, 0, -1, 2])
    assert second.tree.pairs.tolist() == [[0, 1]]


@pytest.mark.parametrize("early", [0, 1])
def test_a_prompt_that_ends_differently_gets_a_node_without_loss(early):
    """Prompt [1, 2, 3]; one side's first token swallowed the 3, so its loss starts at 2."""
    sides = [path([1, 2, 9, 8], 2), path([1, 2, 3, 4], 3)]
    paths = sides if early == 0 else sides[::-1]
    part = view(build_tree(paths, [Pair(chosen=0, rejected=1)]), "pair", 0)
    expected = ([1, 2], [9, 8], [3], [4]) if early == 0 else ([1, 2], [3], [4], [9, 8])
    parents = [-1, 0, 0, 2] if early == 0 else [-1, 0, 1, 0]
    assert nodes_of(part) == (list(expected), parents)
    for local in (0, 1):
        tokens, loss_start = part.tree.response_tokens(local)
        assert tokens.tolist() == paths[local].tokens.tolist()
        assert loss_start == paths[local].loss_start
        assert len(part.tree.response_nodes(local)) == 1


def test_pairs_of_different_prompts_are_refused_in_pair_mode():
    paths = [path([1, 2, 9], 2), path([1, 3, 9], 2)]
    tree = build_tree(paths, [Pair(chosen=0, rejected=1)])
    with pytest.raises(AssertionError, match="different prompts"):
        view(tree, "pair", 0)
