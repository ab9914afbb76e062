"""Steps of several data sets: counts, orders, and what they are a function of."""

from fractions import Fraction

import numpy as np
import pytest
from data_sets import random_group, write_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.data.steps.compositions import StepSettings
from megatron_prefix.data.steps.compositions.mixtures import (
    RepeatedSets,
    WeightedSets,
    largest_remainders,
    whole_numbers,
)
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store import join_datasets
from megatron_prefix.errors import InputError

WEIGHTS = st.lists(
    st.sampled_from([0.1, 0.25, 1.0, 2.0, 3.0, 7.5, 100.0, 1 / 3]), min_size=1, max_size=6
)


def weighted(sizes=(40, 30, 11), weights=(3.0, 2.0, 1.0), batch_size=4, key="f", seed=1):
    return WeightedSets(tuple(sizes), tuple(weights), batch_size, key, seed)


def per_set(composition, groups):
    ends = np.cumsum(composition.sizes)
    return np.bincount(np.searchsorted(ends, groups, "right"), minlength=len(ends)).tolist()


def test_shares_are_the_decimals_as_written():
    assert whole_numbers([0.5, 0.25]) == [2, 1]
    assert whole_numbers([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_numbers([3, 1e-6]) == [3000000, 1]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), WEIGHTS)
def test_largest_remainders_by_definition(total, weights):
    shares = whole_numbers(weights)
    counts = largest_remainders(total, shares)
    assert sum(counts) == total
    quotas = [Fraction(total * share, sum(shares)) for share in shares]
    rounded_up = [i for i, (n, q) in enumerate(zip(counts, quotas, strict=True)) if n > q]
    for i, (count, quota) in enumerate(zip(counts, quotas, strict=True)):
        assert quota - 1 < count < quota + 1
        for j in rounded_up:
            assert i in rounded_up or quota % 1 <= quotas[j] % 1


def test_the_docstrings_example():
    composition = weighted()
    assert [composition.given(t) for t in range(4)] == [[0, 0, 0], [2, 1, 1], [4, 3, 1], [6, 4, 2]]
    steps = [composition.groups(step) for step in range(3)]
    assert [per_set(composition, groups) for groups in steps] == [[2, 1, 1], [2, 2, 0], [2, 1, 1]]


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.integers(1, 70), st.integers(1, 40))
def test_counts_are_rounded_shares_and_never_fall(weights, batch_size, steps):
    composition = weighted([50] * len(weights), weights, batch_size)
    shares = whole_numbers(weights)
    before = [0] * len(weights)
    taken_back = False
    for step in range(1, steps + 1):
        counts = composition.given(step)
        wanted = largest_remainders(step * batch_size, shares)
        assert sum(counts) == step * batch_size
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        taken_back |= any(w < b for w, b in zip(wanted, before, strict=True))
        assert counts == wanted or taken_back
        before = counts
    # a function of the step alone: asked once, from the end, or after a resume
    fresh = weighted([50] * len(weights), weights, batch_size)
    assert fresh.given(steps) == before
    if min(shares) * batch_size >= sum(shares):
        assert not taken_back


def test_a_set_keeps_what_it_gave():
    """[4, 4, 2] of 10 groups, by largest remainders [5, 5, 1] of 11, [5, 5, 2] of 12."""
    shares = [3, 3, 1]
    assert [largest_remainders(n, shares) for n in (10, 11, 12)] == [
        [4, 4, 2],
        [5, 5, 1],
        [5, 5, 2],
    ]
    composition = weighted(weights=shares, batch_size=1)
    assert [composition.given(n) for n in (10, 11, 12)] == [[4, 4, 2], [5, 4, 2], [5, 5, 2]]


def test_no_group_comes_again_before_its_set_is_through():
    composition = weighted()
    groups = np.concatenate([composition.groups(step) for step in range(100)])
    first = 0
    for size in composition.sizes:
        own = groups[(first <= groups) & (groups < first + size)]
        assert len(own) > 2 * size
        passes = [own[i : i + size].tolist() for i in range(0, len(own) - size, size)]
        assert all(sorted(p) == list(range(first, first + size)) for p in passes)
        assert passes[0] != passes[1]
        first += size


def test_weighted_orders_depend_on_key_and_seed_alone():
    steps = [weighted().groups(step).tolist() for step in range(30)]
    fresh = weighted()
    assert [fresh.groups(step).tolist() for step in reversed(range(30))] == steps[::-1]
    for change in ({"key": "g"}, {"seed": 2}):
        assert [weighted(**change).groups(step).tolist() for step in range(30)] != steps
    longer = weighted(sizes=(40, 31, 11))  # another set does not change the first set's order
    assert [g for g in longer.groups(0).tolist() if g < 40] == [g for g in steps[0] if g < 40]


def repeated(sizes=(10, 7, 30), epochs=(2.0, 1.5, 0.25), key="f", seed=1):
    return RepeatedSets(tuple(sizes), tuple(epochs), key, seed)


def test_epochs_of_each_set():
    order = repeated()
    counts = np.bincount(order(0), minlength=47)
    assert (counts[:10] == 2).all()
    assert sorted(counts[10:17].tolist()) == [1] * 3 + [2] * 4  # 10.5 groups: 11
    assert sorted(counts[17:].tolist()) == [0] * 22 + [1] * 8  # 7.5 groups: 8
    assert len(order) == 20 + 11 + 8 == len(order(0))
    assert order(0).tolist() == repeated()(0).tolist() != sorted(order(0))
    assert len(repeated(epochs=(0.1, 0.1, 0.1))) == 1 + 1 + 3


def test_epochs_are_drawn_and_ordered_by_key_and_seed():
    order = repeated()(0)
    for change in ({"key": "g"}, {"seed": 2}):
        other = repeated(**change)(0)
        assert other.tolist() != order.tolist()
        assert set(other.tolist()) != set(order.tolist())


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(5)
    return [
        write_groups(folder / name, [random_group(rng) for _ in range(count)])
        for name, count in (("a", 12), ("b", 9), ("c", 5))
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"weights": (3.0, 2.0, 1.0), "global_batch_size": 5},
        {"set_epochs": (1.0, 2.0, 0.5), "global_batch_size": 5},
        {"set_epochs": (1.0, 2.0, 0.5), "global_batch_size": 5, "sort_by_length": True},
        {"set_epochs": (1.0, 2.0, 0.5), "rows_per_step": 2},
        {"set_epochs": (1.0, 2.0, 0.5), "rows_per_step": 2, "sort_by_length": True},
    ],
)
def test_a_sampler_has_the_same_groups_and_weight_on_any_number_of_ranks(sets, more):
    dataset = join_datasets(sets)
    epochs = 1 if "set_epochs" in more else None
    settings = StepSettings(seed=4, row_capacity=700, epochs=epochs, **more)
    composition = settings.composition(dataset)
    num_steps = composition.num_steps(1)
    seen = []
    for step in range(num_steps):
        plans = [
            Sampler(
                dataset=dataset,
                composition=settings.composition(dataset),
                row_capacity=700,
                num_ranks=ranks,
            ).step(step)
            for ranks in (1, 2, 3)
        ]
        for plan in plans:
            assert plan.groups.tolist() == plans[0].groups.tolist()
            assert plan.denominators == pytest.approx(plans[0].denominators)
            run = sorted(b.group for share in plan.rows for row in share for b in row)
            assert run == sorted(plan.groups.tolist())
        seen += plans[0].groups.tolist()
    if "set_epochs" in more:
        order = RepeatedSets((12, 9, 5), more["set_epochs"], dataset.fingerprint, 4)
        assert sorted(seen) == sorted(order(0).tolist())


def test_the_order_of_the_list_counts(sets):
    one, other = join_datasets(sets), join_datasets(sets[::-1])
    assert one.fingerprint != other.fingerprint
    settings = StepSettings(seed=4, global_batch_size=8, weights=(1.0, 1.0, 1.0))
    assert per_set_names(one, settings) != per_set_names(other, settings)


def per_set_names(dataset, settings):
    groups = settings.composition(dataset).groups(0)
    return [dataset.place(group) for group in groups]


def test_weights_refuse_merged_prompts(sets, tmp_path):
    from data_sets import write

    dataset = sets[0]
    write(tmp_path / "d", [dataset[0], dataset[1]])
    from megatron_prefix.data.store import DatasetWriter, PreferenceDataset

    with DatasetWriter(tmp_path / "m", dataset.manifest["tokenizer"]) as writer:
        writer.add(dataset[0], 0, num_records=2)
        writer.finish()
    merged = join_datasets([dataset, PreferenceDataset(tmp_path / "m")])
    with pytest.raises(InputError, match=r"weights, which share out groups, and .*/m was built"):
        StepSettings(seed=0, global_batch_size=4, weights=(1.0, 1.0)).composition(merged)
    settings = StepSettings(seed=0, global_batch_size=4, set_epochs=(1.0, 2.0), epochs=1)
    composition = settings.composition(merged)
    steps = [composition.groups(step) for step in range(composition.num_steps(1))]
    assert sorted(np.concatenate(steps).tolist()) == [*range(12), 12, 12]
