"""The table of a step: each response that runs has one entry, wherever its row is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ranked_sets import write_ranked_set

from megatron_prefix.data.steps.compositions import StepSettings
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import SHARING_MODES
from megatron_prefix.data.store.dataset import PreferenceDataset

NUM_GROUPS, BATCH = 7, 4
SETTINGS = {
    "tree": {"sharing": "tree", "row_capacity": 300},
    "pair": {"sharing": "pair", "row_capacity": 200},
    "response": {"sharing": "response", "row_capacity": 400},
    "none": {"sharing": "none", "row_capacity": 200},
    "unpacked": {"sharing": "none", "micro_batch_size": 4},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreferenceDataset:
    return PreferenceDataset(write_ranked_set(tmp_path_factory.mktemp("set") / "a", 0, NUM_GROUPS))


def sampler(dataset, mode: str, **more) -> Sampler:
    settings = SETTINGS[mode]
    composition = StepSettings(
        seed=1, sharing=settings["sharing"], row_capacity=None, global_batch_size=BATCH
    ).composition(dataset)
    return Sampler(dataset=dataset, composition=composition, **settings, **more)


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_value_of_a_row_has_its_own_entry(dataset, mode, ranks):
    """What a row knows of its responses and pairs, the table knows at the row's places."""
    own = sampler(dataset, mode, num_ranks=ranks)
    for number in range(3):
        step = own.step(number)
        columns = own.columns(step)
        seen, seen_pairs = [], []
        for rank in range(ranks):
            rows = own.micro_batches(step, rank)
            for bundles, row in zip(step.rows[rank], rows, strict=True):
                entries, pairs = columns.row_places(bundles)
                assert np.array_equal(columns.response_ids[entries], row.response_ids)
                assert np.array_equal(columns.num_tokens[entries], row.response_tokens)
                assert np.array_equal(columns.ranks[entries], row.ranks)
                assert np.array_equal(columns.labels[entries], row.labels)
                desirable = columns.desirable[entries]
                assert np.array_equal(desirable, row.desirable, equal_nan=True)
                assert np.array_equal(columns.pairs[pairs], entries[row.pairs].reshape(-1, 2))
                assert np.array_equal(columns.pair_weights[pairs], row.pair_weights)
                assert np.array_equal(columns.margins[pairs], row.pair_margins)
                seen += entries.tolist()
                seen_pairs += pairs.tolist()
        assert sorted(seen) == list(range(columns.num_entries))
        assert sorted(seen_pairs) == list(range(len(columns.pairs))) and seen_pairs
        assert columns.pair_weights.sum() == pytest.approx(step.denominators["pair"])
        if mode in ("tree", "response"):
            assert columns.set_weights.sum() == step.denominators["set"]
            sets = [x[x >= 0] for x in columns.members]
            assert sorted(np.concatenate(sets).tolist()) == sorted(seen)


@pytest.mark.parametrize("mode", ["tree", "pair", "response", "none"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_parts_make_the_table_of_whole_bundles(dataset, mode, ranks):
    """Its pairs include those whose sides lie in two rows, at the places of both."""
    whole = sampler(dataset, mode)
    capacity = int(dataset.response_lengths.max())
    own = replace(whole, num_ranks=ranks, row_capacity=capacity, oversized="split")
    divided = 0
    for number in range(3):
        step, expected = own.step(number), whole.columns(whole.step(number))
        columns = own.columns(step)
        for name, column in {**expected.arrays(), "ids": expected.response_ids}.items():
            ours = columns.response_ids if name == "ids" else columns.arrays()[name]
            assert np.array_equal(column, ours, equal_nan=column.dtype.kind == "f"), name
        seen, seen_pairs = [], []
        for rank in range(ranks):
            rows = own.micro_batches(step, rank)
            for bundles, row in zip(step.rows[rank], rows, strict=True):
                entries, pairs = columns.row_places(bundles)
                assert row.is_divided == step.is_divided
                assert np.array_equal(columns.response_ids[entries], row.response_ids)
                assert np.array_equal(columns.pairs[pairs], entries[row.pairs].reshape(-1, 2))
                assert np.array_equal(columns.margins[pairs], row.pair_margins)
                seen += entries.tolist()
                seen_pairs += pairs.tolist()
        assert sorted(seen) == list(range(columns.num_entries))
        assert len(seen_pairs) == len(set(seen_pairs))
        divided += len(columns.pairs) - len(seen_pairs)
    assert divided > 0


@pytest.mark.parametrize("mode", SETTINGS)
def test_rows_and_ranks_do_not_change_the_table(dataset, mode):
    one, three = sampler(dataset, mode), sampler(dataset, mode, num_ranks=3)
    for number in range(3):
        a, b = (x.columns(x.step(number)) for x in (one, three))
        for name, column in {**a.arrays(), "ids": a.response_ids}.items():
            other = b.response_ids if name == "ids" else b.arrays()[name]
            assert np.array_equal(column, other, equal_nan=column.dtype.kind == "f"), name


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_group_twice_in_a_step_has_its_entries_twice(dataset, mode):
    """Step 1 crosses the end of the first epoch of seven groups; a later one has a group twice."""
    own = sampler(dataset, mode)
    steps = [own.step(i) for i in range(12)]
    twice = [x for x in steps if len(np.unique(x.groups)) < len(x.groups)]
    assert twice, "no step has a group twice: take another seed"
    for step in twice:
        columns = own.columns(step)
        assert {bundle.slot for bundle in step.bundles} == set(range(BATCH))
        values, counts = np.unique(step.groups, return_counts=True)
        group = int(values[counts.argmax()])
        slots = np.flatnonzero(step.groups == group)
        places = [[p for bundle, p in columns.places.items() if bundle.slot == s] for s in slots]
        first, second = (np.concatenate([x[0] for x in p]) for p in places)
        assert not set(first) & set(second)
        assert np.array_equal(columns.response_ids[first], columns.response_ids[second])


def test_slots_of_fixed_rows_count_through_the_step(dataset):
    composition = StepSettings(
        seed=1, sharing="tree", row_capacity=300, rows_per_step=3
    ).composition(dataset)
    own = Sampler(dataset=dataset, composition=composition, row_capacity=300)
    step = own.step(0)
    slots = [bundle.slot for row in step.rows[0] for bundle in row]
    assert sorted(slots) == list(range(len(step.groups)))
    assert [b.group for b in step.bundles] == step.groups.tolist()


def test_every_mode_is_tested():
    assert {x["sharing"] for x in SETTINGS.values()} == set(SHARING_MODES)
