"""Own responses and mismatches of a data set, each as a data set of its own."""

from __future__ import annotations

import numpy as np
import pytest
from labelled_sets import block_with_roles, write_labelled_set

from megatron_prefix.data.steps.compositions.batches import InOrder
from megatron_prefix.data.steps.cost import bundle_work
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import bundles_of
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.data.store.roles import mismatched_responses, own_responses
from megatron_prefix.data.store.verify import Span, verify_dataset
from megatron_prefix.data.store.verify.problems import column_problems
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree

TREE_FIELDS = ("tokens", "node_offsets", "parents", "response_first", "response_last", "pairs")
TREE_FIELDS += ("response_sets", "ranks", "scores", "pair_weights", "pair_margins")
COLUMNS = ("group_responses", "group_pairs", "response_lengths", "response_prompts")
COLUMNS += ("response_sets", "response_ranks", "response_scores", "pair_responses")


def assert_equal(view, other) -> None:
    """Two data sets have the same groups, whatever lies in files."""
    assert len(view) == len(other)
    for name in COLUMNS:
        ours, theirs = np.asarray(getattr(view, name)), np.asarray(getattr(other, name))
        assert np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f"), name
    assert np.array_equal(view.desirable, other.desirable, equal_nan=True)
    for group in range(len(view)):
        ours, theirs = view[group], other[group]
        for response in range(theirs.num_responses):
            (a, start_a), (b, start_b) = (x.response_tokens(response) for x in (ours, theirs))
            assert np.array_equal(a, b) and start_a == start_b
        assert np.array_equal(ours.pairs, theirs.pairs)
        assert ours.num_tokens == view.group_num_tokens(group) == other.group_num_tokens(group)
        for sharing in ("tree", "response"):
            for mine, its in zip(
                *(bundles_of(x, group, sharing) for x in (view, other)), strict=True
            ):
                assert mine == its
                assert bundle_work(view, mine, sharing) == bundle_work(other, its, sharing)
    assert np.array_equal(view.groups_num_tokens(), other.groups_num_tokens())


@pytest.mark.parametrize("paired", [False, True])
def test_own_responses_are_the_data_set_without_mismatches(tmp_path, paired):
    args = {"seed": 2, "num_groups": 9, "paired": paired}
    plain = PreferenceDataset(write_labelled_set(tmp_path / "plain", **args))
    stored = PreferenceDataset(write_labelled_set(tmp_path / "kto", **args, mismatches=True))
    verify_dataset(stored)
    own = own_responses(stored)
    assert own_responses(plain) is plain and mismatched_responses(plain) is None
    assert own.stored is stored and own.fingerprint == stored.fingerprint
    assert_equal(own, plain)
    others = mismatched_responses(own)
    assert np.diff(others.group_responses).tolist() == [0] + [1] * 8
    assert not np.intersect1d(own.response_numbers, others.response_numbers).size
    joined = np.sort(np.concatenate([own.response_numbers, others.response_numbers]))
    assert joined.tolist() == list(range(len(stored.response_lengths)))
    for group in range(1, 9):
        path, start = others[group].response_tokens(0)
        whole = stored[group]
        expected, expected_start = whole.response_tokens(whole.num_responses - 1)
        assert np.array_equal(path, expected) and start == expected_start
        assert others.group_num_tokens(group) == len(path) and others[group].num_pairs == 0
    assert stored.manifest["counts"]["mismatches"] == 8
    for key in ("tokens", "lengths"):
        assert stored.manifest[key] == plain.manifest[key]
    gained = stored.manifest["counts"]["tokens"] - plain.manifest["counts"]["tokens"]
    assert stored.manifest["counts"]["mismatch_tokens"] == gained > 0


def test_joined_data_sets(tmp_path):
    with_, without = (
        [
            PreferenceDataset(
                write_labelled_set(tmp_path / f"{seed}{kto}", seed, 5, mismatches=kto)
            )
            for seed in (3, 4)
        ]
        for kto in (True, False)
    )
    assert_equal(own_responses(join_datasets(with_)), join_datasets(without))
    mixed = join_datasets([with_[0], without[1]])
    own = own_responses(mixed)
    assert_equal(own, join_datasets(without))
    others = mismatched_responses(own)
    assert np.diff(others.group_responses).tolist() == [0, 1, 1, 1, 1] + [0] * 5
    numbers = np.concatenate([own.response_numbers, others.response_numbers])
    assert np.sort(numbers).tolist() == list(range(len(mixed.response_lengths)))


def test_mismatches_make_rows(tmp_path):
    stored = PreferenceDataset(write_labelled_set(tmp_path / "kto", 2, 9, mismatches=True))
    others = mismatched_responses(stored)
    sampler = Sampler(
        dataset=others, composition=InOrder(9, 4), sharing="response", row_capacity=60
    )
    seen = []
    for number in range(3):
        for row in sampler.micro_batches(sampler.step(number)):
            seen += row.response_ids[:, 0].tolist()
            assert np.isnan(row.desirable).all() and not len(row.pairs)
    assert sorted(seen) == list(range(1, 9))


def test_a_mismatch_in_a_pair_is_a_problem():
    paths = [ResponsePath(tokens=np.array([1, 2, 3 + i]), loss_start=1) for i in range(2)]
    tree = build_tree(paths, [Pair(chosen=0, rejected=1)])
    span = Span(0, 1, block_with_roles([(tree, [0, 1])]))
    assert (0, "pair 0 has a mismatch, which has no label") in list(column_problems(span))
