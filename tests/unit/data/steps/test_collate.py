"""Rows against what every response means on its own: its tokens, and what each should predict."""

import numpy as np
import pytest
from data_sets import path, random_group, three_responses

from megatron_prefix.data.steps.collate import (
    PADDING_TOKEN,
    RowItem,
    collate_packed,
    collate_padded,
    tree_targets,
)
from megatron_prefix.data.steps.sharing import SHARING_MODES, view
from megatron_prefix.data.tree import Pair, build_tree
from megatron_prefix.testing import visibility_by_walking

COLLATES = {"packed": collate_packed, "padded": collate_padded}


def item(tree, sharing="tree", bundle=0, group=0, weights=None):
    part = view(tree, sharing, bundle)
    if weights is None:
        weights = np.arange(1.0, part.tree.num_pairs + 1) + group
    return RowItem(group=group, view=part, pair_weights=weights)


def random_items(seed, sharing):
    """Bundles of three random groups under a sharing mode, and the groups' paths."""
    rng = np.random.default_rng(seed)
    items, given = [], {}
    for group in (7, 3, 5):
        paths, pairs = random_group(rng)
        tree = build_tree(paths, pairs)
        given[group] = paths, pairs
        bundles = {
            "tree": [0],
            "response": np.unique(tree.response_sets),
            "pair": range(len(pairs)),
            "none": range(len(pairs)),
        }[sharing]
        items += [item(tree, sharing, int(b), group) for b in bundles]
    return items, given


def check_against_each_response_alone(batch, given):
    """Every target's visible tokens are its response's tokens before it, at their positions."""
    visible = visibility_by_walking(batch.layout.lengths, batch.layout.parents)
    positions = batch.layout.position_ids()
    assert batch.layout.num_tokens == len(batch.tokens) == len(positions)
    for local, (group, response) in enumerate(batch.response_ids):
        alone = given[group][0][response]
        mine = np.flatnonzero(batch.response == local)
        assert len(mine) == len(alone.tokens) - alone.loss_start
        for depth, target in enumerate(mine, alone.loss_start):
            seen = np.flatnonzero(visible[batch.logit_token[target]])
            assert batch.tokens[seen].tolist() == alone.tokens[:depth].tolist()
            assert positions[seen].tolist() == list(range(depth))
            assert batch.target_token[target] == alone.tokens[depth]


def test_the_docstrings_example():
    tree = build_tree([path([1, 2, 3, 4], 2), path([1, 2, 5, 6, 7], 2)], [])
    batch = collate_packed([item(tree)])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.logit_token.tolist() == [1, 1, 2, 4, 5]
    assert batch.target_token.tolist() == [3, 5, 4, 6, 7]
    assert batch.response.tolist() == [0, 1, 0, 1, 1]
    assert batch.layout.position_ids().tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert (batch.num_responses, batch.num_projected, batch.num_tokens) == (2, 4, 7)


def test_targets_of_a_response_inside_others_by_hand():
    # [5, 6] -> [7] -> [8] | [9, 2]; response 2 is the [7] that the others share.
    source, target, response = tree_targets(three_responses())
    assert response.tolist() == [0, 0, 1, 1, 1, 2]
    assert target.tolist() == [7, 8, 7, 9, 2, 7]
    assert source.tolist() == [1, 2, 1, 2, 4, 1]
    batch = collate_packed([item(three_responses())])
    assert batch.logit_token.tolist() == [1, 1, 1, 2, 2, 4]
    assert batch.num_projected == 3


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("how", COLLATES)
@pytest.mark.parametrize("seed", range(8))
def test_a_row_has_the_targets_of_each_response_alone(seed, how, sharing):
    items, given = random_items(seed, sharing)
    multiple = 1 + seed % 5
    batch = COLLATES[how](items, multiple)
    check_against_each_response_alone(batch, given)
    assert (np.diff(batch.logit_token) >= 0).all()
    assert batch.num_projected == len(set(batch.logit_token.tolist()))
    assert len(batch.tokens) % multiple == 0
    assert batch.num_tokens == sum(i.view.tree.num_tokens for i in items)
    for name in ("tokens", "logit_token", "target_token", "response", "response_ids", "pairs"):
        assert getattr(batch, name).dtype == np.int64, name


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("how", COLLATES)
def test_pairs_keep_their_responses_weights_and_margins(how, sharing):
    items, given = random_items(3, sharing)
    batch = COLLATES[how](items)
    expected, margins = [], []
    for i in items:
        for pair in i.view.pairs:
            pair = given[i.group][1][pair]
            expected.append([(i.group, pair.chosen), (i.group, pair.rejected)])
            margins.append(pair.margin)
    assert batch.response_ids[batch.pairs].tolist() == [[list(s) for s in p] for p in expected]
    assert batch.pair_weights.tolist() == np.concatenate([i.pair_weights for i in items]).tolist()
    assert batch.pair_margins.tolist() == margins
    assert batch.pair_weights.dtype == batch.pair_margins.dtype == np.float64


def test_padding_is_never_a_source_or_a_target():
    for how, collate in COLLATES.items():
        for seed in range(5):
            items, _ = random_items(seed, "none")
            shifted = [  # no data token is 0, so that padding can be told from data
                RowItem(group=i.group, view=lifted(i.view), pair_weights=i.pair_weights)
                for i in items
            ]
            batch = collate(shifted, 16)
            assert (batch.tokens == PADDING_TOKEN).sum() == len(batch.tokens) - batch.num_tokens
            assert (batch.tokens == PADDING_TOKEN).any(), how
            assert (batch.tokens[batch.logit_token] != PADDING_TOKEN).all()
            assert (batch.target_token != PADDING_TOKEN).all()


def lifted(part):
    tree = part.tree
    values = {name: getattr(tree, name) for name in type(tree).__dataclass_fields__}
    values["tokens"] = tree.tokens + 1
    return type(part)(tree=type(tree)(**values), responses=part.responses, pairs=part.pairs)


def test_a_packed_row_ends_in_a_tree_of_padding():
    tree = three_responses()
    batch = collate_packed([item(tree), item(tree)], 8)
    assert len(batch.tokens) == 16 and batch.num_tokens == 12
    assert batch.tokens[12:].tolist() == [0, 0, 0, 0]
    assert batch.layout.parents[-1] == -1 and batch.layout.lengths[-1] == 4
    assert batch.logit_token.max() < 12
    assert len(collate_packed([item(tree)], 6).tokens) == 6  # divides: nothing is added


def test_padded_sequences_are_as_long_as_the_longest():
    tree = three_responses()
    batch = collate_padded([item(tree, "none", 0), item(tree, "none", 1)], 4)
    assert batch.tokens.reshape(4, 8).tolist() == [
        [5, 6, 7, 8, 0, 0, 0, 0],
        [5, 6, 7, 9, 2, 0, 0, 0],
        [5, 6, 7, 0, 0, 0, 0, 0],
        [5, 6, 7, 8, 0, 0, 0, 0],
    ]
    # Padding continues its sequence, so attention pays for it as in a padded batch.
    assert batch.layout.position_ids().reshape(4, 8).tolist() == [list(range(8))] * 4
    assert batch.layout.area() == 4 * 36
    assert batch.logit_token.tolist() == [1, 2, 9, 10, 11, 17, 25, 26]
    assert batch.num_tokens == 4 + 5 + 3 + 4
    assert len(collate_padded([item(tree, "none", 0)]).tokens) == 2 * 5
    # A tree is one sequence, padded after its last leaf.
    small = build_tree([path([1, 2], 1), path([1, 3], 1)], [Pair(chosen=0, rejected=1)])
    batch = collate_padded([item(small), item(tree)])
    assert batch.tokens.reshape(2, 6).tolist() == [[1, 2, 3, 0, 0, 0], [5, 6, 7, 8, 9, 2]]
    assert batch.layout.parents.tolist() == [-1, 0, 0, 2, -1, 4, 5, 5]


@pytest.mark.parametrize("how", COLLATES)
@pytest.mark.parametrize("multiple", [1, 4])
def test_an_empty_row_is_padding_without_loss(how, multiple):
    batch = COLLATES[how]([], multiple)
    assert batch.tokens.tolist() == [PADDING_TOKEN] * multiple
    assert batch.layout.num_tokens == multiple
    assert batch.num_tokens == batch.num_responses == batch.num_projected == 0
    assert len(batch.logit_token) == len(batch.target_token) == len(batch.response) == 0
    assert batch.pairs.shape == batch.response_ids.shape == (0, 2)
    assert batch.pair_weights.shape == batch.pair_margins.shape == (0,)
