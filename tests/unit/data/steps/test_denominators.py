"""Denominators of a step: by hand, and the same as of its rows in every sharing mode."""

import numpy as np
import pytest
import torch
from data_sets import path, write

from megatron_prefix.data.steps.compositions.batches import InOrder
from megatron_prefix.data.steps.denominators import step_denominators
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tree import Pair, build_tree
from megatron_prefix.engine.batch import to_device


@pytest.fixture
def dataset(tmp_path) -> PreferenceDataset:
    """A group of two sets, of which one has nothing to compare, and a group of one pair."""
    nan = float("nan")
    first = [
        path([1, 2, 3, 4], 2, set_id=0, score=1.0),
        path([1, 2, 5], 2, set_id=0, score=nan),
        path([1, 2, 6, 7, 8], 2, set_id=0, score=0.5),
        path([1, 2, 3, 4, 9, 5], 5, set_id=1, score=0.25),
    ]
    pairs = [
        Pair(chosen=0, rejected=1, weight=2.0),
        Pair(chosen=0, rejected=2, weight=0.5),
        Pair(chosen=2, rejected=1),
    ]
    second = [path([1, 4, 4, 4], 1), path([1, 5], 1, score=2.0)]
    trees = [build_tree(first, pairs), build_tree(second, [Pair(chosen=1, rejected=0)])]
    write(tmp_path / "set", trees)
    return PreferenceDataset(tmp_path / "set")


def test_by_hand(dataset):
    # tokens: 2 x 2 + 0.5 x 2 + 1 x 3 of the first group, 1 of the second
    expected = {"pair": 4.5, "set": 2.0, "response": 4.0, "token": 9.0, "label": 4.0}
    assert step_denominators(dataset, [0, 1], "pair") == expected
    weights = np.array([2.0, 0.5, 1.0]) / 3.5
    tokens = float((weights * [2, 2, 3]).sum()) + 1
    assert step_denominators(dataset, [0, 1], "group") == pytest.approx(
        {**expected, "pair": 2.0, "token": tokens}
    )


def test_a_group_that_is_there_twice_counts_twice(dataset):
    once, twice = (step_denominators(dataset, x, "pair") for x in ([0], [0, 0]))
    assert twice == {unit: 2 * x for unit, x in once.items()}


@pytest.mark.parametrize("weighting", ["pair", "group"])
@pytest.mark.parametrize("sharing", ["tree", "response", "none", "pair"])
def test_rows_add_up_to_the_step(dataset, sharing, weighting):
    sampler = Sampler(
        dataset=dataset,
        composition=InOrder(2, 2),
        sharing=sharing,
        weighting=weighting,
        row_capacity=20,
    )
    plan = sampler.step(0)
    units = ("pair", "token") if sharing in ("none", "pair") else plan.denominators.keys()
    totals = dict.fromkeys(units, 0.0)
    for row in sampler.micro_batches(plan):
        batch = to_device(row, torch.device("cpu"), plan.denominators)
        scores = torch.zeros(row.num_responses, dtype=torch.float64)
        own = batch.loss_inputs(scores).denominators()
        totals = {unit: total + float(own[unit]) for unit, total in totals.items()}
    assert totals == pytest.approx({unit: plan.denominators[unit] for unit in units})
