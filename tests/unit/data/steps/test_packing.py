"""Packing against naive statements of the same algorithms."""

import numpy as np
import pytest
from naive_packing import check_rows, naive_first_fit_decreasing

from megatron_prefix.data.steps.packing import deal, first_fit_decreasing, pack_step, spread

SEEDS = range(40)


def random_lengths(seed, most=60):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 80))
    return rng.integers(1, capacity + 1, rng.integers(1, most)).tolist(), capacity


def test_worked_example():
    assert first_fit_decreasing([3, 7, 5, 2], capacity=8) == [[1], [2, 0], [3]]


@pytest.mark.parametrize("seed", SEEDS)
def test_first_fit_decreasing_equals_the_naive_one(seed):
    lengths, capacity = random_lengths(seed)
    rows = first_fit_decreasing(lengths, capacity)
    assert rows == naive_first_fit_decreasing(lengths, capacity)
    check_rows(rows, lengths, capacity)
    assert all(rows)


def test_a_row_as_long_as_its_capacity_and_equal_lengths_in_order():
    assert first_fit_decreasing([8, 8], 8) == [[0], [1]]
    assert first_fit_decreasing([2, 2, 2, 2, 2], 4) == [[0, 1], [2, 3], [4]]
    assert first_fit_decreasing([], 4) == []


def test_too_long_an_item_is_named():
    with pytest.raises(ValueError, match="item 2 has 9 tokens, and a row 8"):
        first_fit_decreasing([1, 8, 9, 3], 8)


def test_spread_takes_the_emptiest_row():
    assert spread([5, 4, 3, 2], 10, 2) == [[0, 3], [1, 2]]
    assert spread([2, 3], 10, 4) == [[1], [0], [], []]
    assert spread([5, 5], 5, 2) == [[0], [1]]
    assert spread([6, 6, 6], 10, 2) is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_a_step_has_as_few_rows_as_its_multiple_allows(seed, multiple):
    lengths, capacity = random_lengths(seed, most=25)
    rows = pack_step(lengths, capacity, multiple)
    check_rows(rows, lengths, capacity)
    needed = len(naive_first_fit_decreasing(lengths, capacity))
    assert len(rows) == -(-needed // multiple) * multiple
    num_empty = sum(not row for row in rows)
    if spread(lengths, capacity, len(rows)) is not None:
        assert num_empty == max(len(rows) - len(lengths), 0)
    assert num_empty < multiple


def test_steps_by_hand():
    assert pack_step([3, 7, 5, 2], 8, 1) == [[1], [2, 0], [3]]
    assert pack_step([2, 2, 2], 8, 2) == [[0, 2], [1]]  # one row would do: two share the work
    assert pack_step([2], 8, 4) == [[0], [], [], []]
    assert pack_step([], 8, 3) == [[], [], []]


def test_if_spreading_does_not_fit_the_packed_rows_stay():
    lengths = [8, 10, 7, 9, 11, 5, 18, 11, 7, 8, 17, 14, 8, 6, 8, 6, 4, 4, 5, 12, 4, 8, 10, 4, 8]
    packed = first_fit_decreasing(lengths, 18)
    assert len(packed) == 12 and spread(lengths, 18, 13) is None
    assert pack_step(lengths, 18, 13) == [*packed, []]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_get_equal_counts_and_similar_costs(seed, num_ranks):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 100, num_ranks * int(rng.integers(1, 12))).tolist()
    ranks = deal(costs, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(row for rank in ranks for row in rank) == list(range(len(costs)))
    assert {len(rank) for rank in ranks} == {len(costs) // num_ranks}
    assert all(rank == sorted(rank) for rank in ranks)
    totals = [sum(costs[row] for row in rank) for rank in ranks]
    assert max(totals) - min(totals) <= max(costs)


def test_deal_by_hand():
    assert deal([9, 1, 8, 2], 2) == [[0, 1], [2, 3]]
    assert deal([5, 5, 5], 1) == [[0, 1, 2]]
    assert deal([10, 1, 1, 1], 2) == [[0, 3], [1, 2]]  # equal counts come before equal costs
    with pytest.raises(AssertionError, match=r"\(3, 2\)"):
        deal([1, 1, 1], 2)
