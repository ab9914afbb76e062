"""Properties of packing, plans, the store and resuming, for any input that hypothesis finds."""

import tempfile
from pathlib import Path

import numpy as np
from data_sets import TOKENIZER, assert_same, write_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_packing import check_rows, naive_first_fit_decreasing

from megatron_prefix.data.steps.compositions.settings import StepSettings
from megatron_prefix.data.steps.packed.reading import PackedSteps
from megatron_prefix.data.steps.packed.writing import write_packed_steps
from megatron_prefix.data.steps.packing import as_lists, deal, pack, pack_step, spread
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.statistics import path_lengths
from megatron_prefix.data.store.verify.checks import verify_dataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree

FEW = settings(max_examples=25, deadline=None)
items = st.integers(4, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


def naive_best_fit_decreasing(lengths, capacity):
    """Room that is left in the rows, sorted."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        left = min(fitting, default=capacity)
        if fitting:
            room.remove(left)
        room.append(left - length)
    return sorted(room)


@given(items)
def test_packing_is_what_its_definition_says(given):
    lengths, capacity = given
    assert as_lists(*pack(lengths, capacity)) == naive_first_fit_decreasing(lengths, capacity)
    rows = as_lists(*pack(lengths, capacity, "best-fit"))
    check_rows(rows, lengths, capacity)
    room = sorted(capacity - sum(lengths[i] for i in row) for row in rows)
    assert room == naive_best_fit_decreasing(lengths, capacity)


@given(items, st.integers(1, 5), st.data())
def test_a_step_for_several_ranks_holds_every_item_once(given, multiple, data):
    lengths, capacity = given
    costs = data.draw(st.lists(st.floats(0.1, 9), min_size=len(lengths), max_size=len(lengths)))
    rows = pack_step(lengths, capacity, multiple, costs)
    check_rows(rows, lengths, capacity)
    needed = max(len(naive_first_fit_decreasing(lengths, capacity)), 1)
    assert len(rows) == -(-needed // multiple) * multiple
    spread_rows = spread(lengths, capacity, len(rows), costs)
    if spread_rows is not None:
        check_rows(spread_rows, lengths, capacity)
    totals = [sum(costs[i] for i in row) for row in rows]
    dealt = deal(totals, multiple)
    assert sorted(i for share in dealt for i in share) == list(range(len(rows)))


@st.composite
def groups(draw):
    """A prompt, two or more different responses that may share tokens, and pairs of them."""
    tokens = st.lists(st.integers(0, 6), min_size=1, max_size=5)
    prompt = draw(tokens)
    answers = draw(st.lists(tokens, min_size=2, max_size=4, unique_by=tuple))
    paths = [
        ResponsePath(tokens=np.array([*prompt, *own]), loss_start=len(prompt), rank=i, score=i / 3)
        for i, own in enumerate(answers)
    ]
    sides = st.permutations(range(len(paths))).map(lambda order: order[:2])
    chosen = draw(st.lists(sides, min_size=1, max_size=3))
    weights = draw(st.lists(st.floats(0.1, 5), min_size=len(chosen), max_size=len(chosen)))
    pairs = [
        Pair(chosen=c, rejected=r, weight=w) for (c, r), w in zip(chosen, weights, strict=True)
    ]
    return paths, pairs


many = st.lists(groups(), min_size=1, max_size=12)


@FEW
@given(many, st.integers(1, 5))
def test_the_store_returns_the_same_trees_in_any_blocks(drawn, block):
    trees = [build_tree(*group) for group in drawn]
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(Path(folder) / "one", TOKENIZER) as writer:
            for record, tree in enumerate(trees):
                writer.add(tree, record)
            writer.finish()
        with DatasetWriter(Path(folder) / "cut", TOKENIZER) as writer:
            for start in range(0, len(trees), block):
                part = trees[start : start + block]
                writer.add_block(Block.of_trees(part, [(start + i, 1) for i in range(len(part))]))
            writer.finish()
        dataset = PreferenceDataset(Path(folder) / "cut")
        verify_dataset(dataset)
        assert dataset.manifest == PreferenceDataset(Path(folder) / "one").manifest
        for group, tree in enumerate(trees):
            assert_same(dataset[group], tree)
            lengths, prompts = path_lengths(tree)
            start = int(dataset.group_responses[group])
            assert (
                dataset.response_lengths[start : start + len(lengths)].tolist() == lengths.tolist()
            )
            assert (
                dataset.response_prompts[start : start + len(lengths)].tolist() == prompts.tolist()
            )


@FEW
@given(
    many,
    st.integers(0, 9),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["first-fit", "best-fit"]),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_run_continues_at_any_step_on_any_number_of_ranks_with_or_without_a_plan(
    drawn, seed, size, by_rows, is_sorted, method, epochs, num_ranks
):
    """Every step from a sampler of its own, as after a resume, is the step of the whole run."""
    plan_settings = StepSettings(
        seed=seed,
        row_capacity=64,
        global_batch_size=None if by_rows else size,
        rows_per_step=size if by_rows else None,
        sort_by_length=is_sorted,
        packing_method=method,
        epochs=epochs,
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_groups(Path(folder) / "set", drawn)
        write_packed_steps(dataset, plan_settings, Path(folder) / "plan")
        plan = PackedSteps(Path(folder) / "plan")
        plan.check(dataset, plan_settings, None)
        whole = plan_settings.composition(dataset)
        counts = np.zeros(len(drawn), int)
        for step in range(plan.num_steps(epochs)):
            compositions = [plan, plan_settings.composition(dataset), whole]
            steps = [
                Sampler(
                    dataset=dataset,
                    composition=composition,
                    row_capacity=64,
                    packing_method=method,
                    num_ranks=num_ranks,
                ).step(step)
                for composition in compositions
            ]
            assert steps[0].rows == steps[1].rows == steps[2].rows
            assert steps[0].denominators == steps[2].denominators
            assert len(steps[0].rows) == num_ranks
            for row in (row for share in steps[0].rows for row in share):
                assert sum(bundle.num_tokens for bundle in row) <= 64
            np.add.at(counts, steps[0].groups, 1)
        assert counts.tolist() == [epochs] * len(drawn)
