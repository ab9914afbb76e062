"""The step plan: who is in which step, in which row, on which rank, and what divides the loss."""

import numpy as np
import pytest
from data_sets import random_group, write_groups

from megatron_prefix.data.steps.compositions.batches import GroupBatches
from megatron_prefix.data.steps.compositions.order import epoch_order
from megatron_prefix.data.steps.compositions.row_batches import RowBatches
from megatron_prefix.data.steps.rows import loss_weights
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import SHARING_MODES, group_lengths
from megatron_prefix.data.tree import Pair, ResponsePath
from megatron_prefix.errors import InputError

GROUPS = 30
CAPACITY = 640


@pytest.fixture(scope="module")
def groups():
    return [random_group(np.random.default_rng([1, seed])) for seed in range(GROUPS)]


@pytest.fixture(scope="module")
def dataset(groups, tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("sampler") / "random", groups)


def batches(dataset, size=7, seed=3, limit=None):
    return GroupBatches(len(dataset), size, dataset.fingerprint, seed, limit)


def row_batches(dataset, sharing="tree", rows=3, seed=3, window=11):
    lengths = group_lengths(dataset, sharing)
    capacity = int(lengths.max()) + 7
    return RowBatches(lengths, capacity, rows, dataset.fingerprint, seed, window)


def groups_of_steps(composition, steps):
    return [composition.groups(step).tolist() for step in range(steps)]


class TestGroupBatches:
    def test_the_docstrings_example(self):
        """Epochs run on into each other: no step is short until the limit."""
        order = GroupBatches(5, 2, "f", 0)
        first, second = (epoch_order(5, "f", 0, epoch).tolist() for epoch in (0, 1))
        assert first != second
        flat = [*first, *second]
        assert groups_of_steps(order, 5) == [flat[i : i + 2] for i in range(0, 10, 2)]

    def test_a_step_is_a_function_of_its_number_alone(self, dataset):
        forwards = groups_of_steps(batches(dataset), 20)
        assert [batches(dataset).groups(s).tolist() for s in reversed(range(20))] == forwards[::-1]

    def test_seed_and_fingerprint_change_the_order(self, dataset):
        groups = groups_of_steps(batches(dataset), 4)
        assert groups_of_steps(batches(dataset, seed=4), 4) != groups
        other = GroupBatches(len(dataset), 7, "another data set", 3)
        assert groups_of_steps(other, 4) != groups

    def test_the_order_stays_what_it_is(self):
        """A resumed run of an earlier version continues with the same groups."""
        assert GroupBatches(8, 8, "fingerprint", 1234).groups(0).tolist() == [
            0,
            7,
            4,
            6,
            1,
            5,
            2,
            3,
        ]

    def test_every_epoch_visits_every_group_once(self, dataset):
        flat = sum(groups_of_steps(batches(dataset), 30), [])
        for epoch in range(len(flat) // GROUPS):
            assert sorted(flat[epoch * GROUPS : (epoch + 1) * GROUPS]) == list(range(GROUPS))

    def test_epochs_end_in_a_short_step(self, dataset):
        limited = batches(dataset, size=7, limit=2)
        assert limited.num_steps(2) == 9
        steps = groups_of_steps(limited, 9)
        assert [len(step) for step in steps] == [7] * 8 + [4]
        assert steps[:8] == groups_of_steps(batches(dataset), 8)
        counts = np.bincount(sum(steps, []), minlength=GROUPS)
        assert counts.tolist() == [2] * GROUPS
        assert batches(dataset, size=7).num_steps(1) == 5
        assert batches(dataset, size=15, limit=2).num_steps(2) == 4  # none is short

    def test_a_batch_larger_than_the_data_set(self, dataset):
        step = batches(dataset, size=70).groups(0)
        assert np.bincount(step).min() >= 2 and len(step) == 70
        assert len(batches(dataset, size=70, limit=1).groups(0)) == GROUPS


class TestRowBatches:
    def test_every_group_once_an_epoch_in_rows_within_capacity(self, dataset):
        order = row_batches(dataset)
        step = 0
        for epoch in range(4):
            seen, counts = [], []
            for _ in range(order._steps_of(epoch)):
                rows = order.rows(step)
                assert all(order.lengths[row].sum() <= order.capacity for row in rows)
                assert order.groups(step).tolist() == [g for row in rows for g in row]
                seen += order.groups(step).tolist()
                counts.append(len(rows))
                step += 1
            assert sorted(seen) == list(range(GROUPS))
            assert all(count == 3 for count in counts[:-1]) and 1 <= counts[-1] <= 3
        assert order.num_steps(4) == step

    def test_epochs_may_differ_in_their_number_of_rows(self):
        lengths = np.random.default_rng(0).integers(20, 60, 40)
        order = RowBatches(lengths, 100, 1, "f", 0, window=8)
        sizes = [len(order._epoch(epoch)[0]) for epoch in range(8)]
        assert len(set(sizes)) > 1
        seen = [order.groups(step).tolist() for step in range(order.num_steps(8))]
        at = 0
        for size in sizes:
            assert sorted(sum(seen[at : at + size], [])) == list(range(40))
            at += size
        assert at == order.num_steps(8)

    def test_a_step_is_a_function_of_its_number_alone(self, dataset):
        forwards = groups_of_steps(row_batches(dataset), 12)
        fresh = [row_batches(dataset).groups(s).tolist() for s in reversed(range(12))]
        assert fresh == forwards[::-1]
        assert groups_of_steps(row_batches(dataset, seed=9), 12) != forwards

    def test_groups_of_a_row_come_from_one_window(self):
        order = RowBatches(np.full(40, 10), 100, 1, "f", 0, window=10)
        rows = [set(order.groups(step).tolist()) for step in range(4)]
        assert [len(row) for row in rows] == [10] * 4
        assert set.union(*rows) == set(range(40))

    def test_fill_is_tokens_over_capacity(self):
        assert RowBatches(np.array([6, 4, 5, 5]), 10, 1, "f", 0).fill() == 1.0
        assert RowBatches(np.array([6, 6]), 10, 1, "f", 0).fill() == 0.6

    def test_too_long_a_group_is_named_at_once(self):
        with pytest.raises(InputError, match="row_capacity is 10 and group 2 has 12 tokens"):
            RowBatches(np.array([3, 4, 12]), 10, 1, "f", 0)


class TestWeights:
    def test_by_hand(self, tmp_path):
        paths = [
            ResponsePath(tokens=np.array([1, *own]), loss_start=1, set_id=s)
            for own, s in (([2], 0), ([3], 0), ([2, 4], 1), ([2, 5], 1), ([2, 6], 1))
        ]
        sides = [(0, 1, 3.0), (2, 3, 1.0), (2, 4, 0.5), (4, 3, 0.5)]
        pairs = [Pair(chosen=c, rejected=r, weight=w) for c, r, w in sides]
        dataset = write_groups(tmp_path / "weights", [(paths, pairs)])
        assert loss_weights(dataset, 0, "pair").tolist() == [3.0, 1.0, 0.5, 0.5]
        assert loss_weights(dataset, 0, "group").tolist() == [1.0, 0.5, 0.25, 0.25]

    def test_every_comparison_set_weighs_one(self, dataset, groups):
        for group, (paths, pairs) in enumerate(groups):
            weights = loss_weights(dataset, group, "group")
            sets = np.array([paths[p.chosen].set_id for p in pairs])
            assert np.bincount(sets, weights)[np.unique(sets)] == pytest.approx(1)


def samplers(dataset, sharing, how, **kwargs):
    """The two ways to batch, and to lay out, that a configuration can ask for."""
    kwargs = {"sharing": sharing, **kwargs}
    if how == "rows":
        order = row_batches(dataset, sharing)
        return Sampler(dataset=dataset, composition=order, row_capacity=order.capacity, **kwargs)
    size = {"micro_batch_size": 4} if how == "unpacked" else {"row_capacity": CAPACITY}
    return Sampler(dataset=dataset, composition=batches(dataset), **size, **kwargs)


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("how", ["packed", "unpacked", "rows"])
@pytest.mark.parametrize(("num_ranks", "count_multiple"), [(1, 1), (2, 1), (3, 2)])
def test_every_pair_once_a_step_over_all_ranks(
    dataset, groups, sharing, how, num_ranks, count_multiple
):
    weighting = "group" if num_ranks == 2 else "pair"
    sampler = samplers(
        dataset,
        sharing,
        how,
        num_ranks=num_ranks,
        count_multiple=count_multiple,
        row_multiple=4,
        weighting=weighting,
    )
    for step in (0, 3):
        plan = sampler.step(step)
        assert plan.step == step
        pairs, weight = [], 0.0
        rows = [sampler.micro_batches(plan, rank) for rank in range(num_ranks)]
        for row in (row for rank in rows for row in rank):
            ids = row.response_ids[row.pairs].tolist()
            pairs += [(c[0], c[1], r[0], r[1]) for c, r in ids]
            weight += row.pair_weights.sum()
            assert len(row.tokens) % 4 == 0
            if how == "packed":
                assert row.num_tokens <= CAPACITY
        wanted = [(g, p.chosen, g, p.rejected) for g in plan.groups.tolist() for p in groups[g][1]]
        assert sorted(pairs) == sorted(wanted)
        assert plan.num_pairs == len(wanted)
        assert weight == pytest.approx(plan.denominators["pair"], rel=1e-12)
        by_hand = sum(loss_weights(dataset, g, weighting).sum() for g in plan.groups)
        assert plan.denominators["pair"] == pytest.approx(by_hand, rel=1e-12)
        assert len({len(rank) for rank in rows}) == 1
        assert len(rows[0]) % count_multiple == 0
        empty = sum(row.num_tokens == 0 for rank in rows for row in rank)
        assert empty < num_ranks * count_multiple


@pytest.mark.parametrize("how", ["packed", "unpacked", "rows"])
def test_a_plan_is_a_pure_function_and_ranks_share_its_groups(dataset, how):
    for step in (5, 0, 2):
        plan = samplers(dataset, "tree", how).step(step)
        again = samplers(dataset, "tree", how).step(step)
        assert plan.rows == again.rows and plan.denominators == again.denominators
        for num_ranks in (2, 4):
            other = samplers(dataset, "tree", how, num_ranks=num_ranks).step(step)
            assert other.groups.tolist() == plan.groups.tolist()
            assert other.denominators == plan.denominators


def test_all_modes_see_the_same_groups(dataset):
    for step in range(3):
        hows = [(sharing, how) for sharing in SHARING_MODES for how in ("packed", "unpacked")]
        plans = [samplers(dataset, sharing, how).step(step) for sharing, how in hows]
        assert len({tuple(plan.groups.tolist()) for plan in plans}) == 1
        assert len({tuple(plan.denominators.values()) for plan in plans}) == 1


def test_another_sharing_mode_on_the_same_row_plan(dataset):
    """Rows planned for trees: unshared they overflow, and are packed again with the same groups."""
    order = row_batches(dataset, "tree")
    tree = Sampler(dataset=dataset, composition=order, row_capacity=order.capacity).step(1)
    for unshared in (
        {"sharing": "none", "row_capacity": order.capacity},
        {"sharing": "none", "micro_batch_size": 2},
        {"sharing": "tree", "micro_batch_size": 2, "row_capacity": order.capacity},
    ):
        sampler = Sampler(dataset=dataset, composition=order, **unshared)
        plan = sampler.step(1)
        assert plan.groups.tolist() == tree.groups.tolist()
        assert plan.denominators == tree.denominators
        for row, batch in zip(plan.rows[0], sampler.micro_batches(plan), strict=True):
            if "micro_batch_size" in unshared:
                sequences = len(row) * (2 if unshared["sharing"] == "none" else 1)
                assert sequences <= 2
            else:
                assert len(batch.tokens) <= order.capacity


def test_unpacked_rows_hold_that_many_sequences(dataset):
    sampler = samplers(dataset, "none", "unpacked")
    plan = sampler.step(0)
    for row, batch in zip(plan.rows[0], sampler.micro_batches(plan), strict=True):
        assert batch.num_responses == 2 * len(row) <= 4
        assert len(batch.tokens) % batch.num_responses == 0
    assert all(len(row) == 2 for row in plan.rows[0][:-1])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Group 0: a pair of 3 and 4 tokens. Group 1: responses of 10, 4 and 5 tokens and two pairs,
    each with a prompt of one token."""

    def response(length):
        tokens = np.concatenate([[1], np.full(length - 2, 2), [length % 7]])
        return ResponsePath(tokens=tokens, loss_start=1)

    small = [response(3), response(4)], [Pair(chosen=0, rejected=1)]
    sides = Pair(chosen=1, rejected=2), Pair(chosen=0, rejected=2)
    large = [response(n) for n in (10, 4, 5)], sides
    return write_groups(tmp_path_factory.mktemp("uneven") / "uneven", [small, large])


class TestErrors:
    @pytest.mark.parametrize(
        ("sharing", "needs"), [("tree", 12), ("pair", 14), ("response", 19), ("none", 15)]
    )
    def test_too_long_for_a_row_is_found_before_any_step(self, uneven, sharing, needs):
        def make(capacity):
            return Sampler(
                dataset=uneven,
                composition=batches(uneven, 1),
                sharing=sharing,
                row_capacity=capacity,
            )

        message = f"row_capacity is {needs - 1} and group 1 .*{needs} tokens.*sharing: {sharing}"
        with pytest.raises(InputError, match=message):
            make(needs - 1)
        make(needs).step(0)

    @pytest.mark.parametrize(
        ("sharing", "needs"), [("tree", 12), ("pair", 14), ("response", 10), ("none", 10)]
    )
    def test_unpacked_the_capacity_bounds_one_sequence(self, uneven, sharing, needs):
        def make(capacity):
            return Sampler(
                dataset=uneven,
                composition=batches(uneven, 1),
                sharing=sharing,
                micro_batch_size=3,
                row_capacity=capacity,
            )

        message = f"row_capacity is {needs - 1} and group 1 .*{needs} tokens in one sequence"
        with pytest.raises(InputError, match=message):
            make(needs - 1)
        make(needs)

    def test_too_small_a_micro_batch_names_the_group_and_both_numbers(self, uneven):
        def make(sharing, size):
            return Sampler(
                dataset=uneven,
                composition=batches(uneven, 2),
                sharing=sharing,
                micro_batch_size=size,
            )

        with pytest.raises(InputError, match="micro_batch_size is 2 and group 1 .* 3 sequences"):
            make("response", 2)
        with pytest.raises(InputError, match="micro_batch_size is 1 and group 0 .* 2 sequences"):
            make("none", 1)
        for sharing, size in (("response", 3), ("none", 2), ("tree", 1), ("pair", 1)):
            sampler = make(sharing, size)
            assert len(sampler.micro_batches(sampler.step(0))) >= 2

    def test_neither_packing_nor_micro_batches(self, uneven):
        with pytest.raises(ValueError, match="row_capacity .* or micro_batch_size"):
            Sampler(dataset=uneven, composition=batches(uneven, 1))
