"""Steps whose responses run alone."""

from __future__ import annotations

import numpy as np
import pytest
from ranked_sets import write_ranked_set

from megatron_prefix.data.steps.alone import AloneSteps
from megatron_prefix.data.steps.compositions.batches import GroupBatches
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store.dataset import PreferenceDataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> PreferenceDataset:
    return PreferenceDataset(write_ranked_set(tmp_path_factory.mktemp("alone") / "set", 0, 7))


def steps(dataset: PreferenceDataset, **settings) -> AloneSteps:
    composition = GroupBatches(len(dataset), 5, dataset.fingerprint, seed=1)
    options = {"dataset": dataset, "composition": composition, "row_capacity": 4096}
    return AloneSteps(sampler=Sampler(**options, **settings))


def test_every_response_is_alone_in_its_row(dataset):
    alone = steps(dataset)
    plan = alone.step(0)
    rows = alone.micro_batches(plan)
    ids = np.concatenate([row.response_ids for row in rows])
    expected = [(g, r) for g in plan.groups for r in range(dataset[g].num_responses)]
    assert [tuple(x) for x in ids] == expected
    for row, (group, response) in zip(rows, ids, strict=True):
        tokens, loss_start = dataset[group].response_tokens(response)
        assert np.array_equal(row.tokens, tokens) and len(row.pairs) == 0
        assert np.array_equal(row.target_token, tokens[loss_start:])
        assert np.array_equal(row.layout.position_ids(), np.arange(len(tokens)))


def test_the_table_has_all_pairs_and_the_step_its_denominators(dataset):
    alone = steps(dataset, weighting="group")
    plan, whole = alone.step(0), alone.sampler.step(0)
    assert plan.denominators == whole.denominators
    columns = alone.columns(plan)
    assert len(columns.pairs) == whole.num_pairs == plan.num_pairs
    assert columns.pair_weights.sum() == pytest.approx(whole.denominators["pair"])
    assert len(columns.response_ids) == sum(dataset[g].num_responses for g in plan.groups)


def test_a_group_that_is_twice_in_a_step_runs_twice(dataset):
    """Seven groups, five per step: step 1 runs over the end of the epoch."""
    alone = steps(dataset)
    step = next(s for s in range(9) if len(np.unique(alone.step(s).groups)) < 5)
    plan = alone.step(step)
    assert alone.columns(plan).num_entries == len(plan.rows[0])
    slots = {bundle.slot for row in plan.rows[0] for bundle in row}
    assert slots == set(range(5))


@pytest.mark.parametrize(("ranks", "multiple"), [(2, 1), (3, 2), (8, 4)])
def test_ranks_have_equally_many_rows_and_whole_groups(dataset, ranks, multiple):
    alone = steps(dataset, num_ranks=ranks, count_multiple=multiple, row_multiple=4)
    plan = alone.step(0)
    assert len({len(rows) for rows in plan.rows}) == 1 and len(plan.rows[0]) % multiple == 0
    owner = [{bundle.slot for row in rows for bundle in row} for rows in plan.rows]
    assert sorted(slot for own in owner for slot in own) == list(range(5))
    for rank in range(ranks):
        rows = alone.micro_batches(plan, rank)
        assert all(len(row.tokens) % 4 == 0 for row in rows)
        assert all(
            row.num_responses == len(own) for row, own in zip(rows, plan.rows[rank], strict=True)
        )


def test_only_the_first_groups(dataset):
    alone = AloneSteps(sampler=steps(dataset).sampler, most_groups=1)
    plan, whole = alone.step(0), alone.sampler.step(0)
    assert plan.groups.tolist() == whole.groups[:1].tolist()
    assert plan.denominators == whole.denominators
