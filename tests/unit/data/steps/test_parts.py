"""Parts of bundles that do not fit: every response once, each part fits, nothing else changes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from data_sets import path, random_group, write_groups

from megatron_prefix.data.steps.compositions.batches import GroupBatches
from megatron_prefix.data.steps.compositions.part_batches import Block, PartBatches, in_steps
from megatron_prefix.data.steps.compositions.settings import StepSettings
from megatron_prefix.data.steps.cost import CostModel, bundle_work
from megatron_prefix.data.steps.packed.reading import PackedSteps, describe_packed_steps
from megatron_prefix.data.steps.packed.verifying import verify_packed_steps
from megatron_prefix.data.steps.packed.writing import write_packed_steps
from megatron_prefix.data.steps.parts import Limits, cut_sequences, cut_tree
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import SHARING_MODES, all_parts, bundles_of, view
from megatron_prefix.data.tree import Pair
from megatron_prefix.errors import InputError

SEEDS = 40
SETTINGS = {"seed": 3, "oversized": "split", "epochs": 2}


@pytest.fixture(scope="module")
def groups():
    return [random_group(np.random.default_rng([7, seed])) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def dataset(groups, tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("parts") / "random", groups)


@pytest.fixture(scope="module")
def capacity(dataset):
    """The smallest: the longest path."""
    return int(dataset.response_lengths.max())


def limits(capacity):
    return Limits(tokens=capacity)


def test_the_docstrings_example():
    parts = cut_tree([5, 3, 2, 4, 1], [-1, 0, 1, 1, 0], [1, 2, 3, 4], 12)
    assert [part.responses for part in parts] == [(0, 1), (2,), (3,)]
    assert [part.num_tokens for part in parts] == [10, 12, 6]
    assert [part.repeated for part in parts] == [0, 8, 5]


def test_sequences_are_cut_by_tokens_and_by_number():
    parts = cut_sequences([0, 2, 5], [4, 4, 3], Limits(tokens=8))
    assert [part.responses for part in parts] == [(0, 2), (5,)]
    parts = cut_sequences([0, 2, 5], [4, 4, 3], Limits(sequences=1))
    assert [part.responses for part in parts] == [(0,), (2,), (5,)]
    assert not any(part.repeated for part in parts)


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("more", [0, 5, 20])
def test_parts_hold_each_response_once_with_its_path_and_fit(
    dataset, groups, capacity, sharing, more
):
    """Also: the pairs of a part are those with both sides in it, and tokens are counted right."""
    cut = 0
    for group, (paths, pairs) in enumerate(groups):
        whole = {b.item: b for b in bundles_of(dataset, group, sharing)}
        parts = bundles_of(dataset, group, sharing, limits(capacity + more))
        assert [b.item for b in parts] == sorted(b.item for b in parts)
        responses = {item: Counter() for item in whole}
        extra = Counter()
        for bundle in parts:
            run = view(dataset[group], sharing, bundle.item, bundle.part)
            cut += bundle.part is not None
            assert bundle.num_tokens == run.tree.num_tokens <= capacity + more
            responses[bundle.item].update(run.responses.tolist())
            extra[bundle.item] += run.tree.num_tokens
            if bundle.part is not None:
                extra[bundle.item] -= bundle.part.repeated
            for local, response in enumerate(run.responses.tolist()):
                tokens, loss_start = run.tree.response_tokens(local)
                assert tokens.tolist() == paths[response].tokens.tolist()
                assert loss_start == paths[response].loss_start
                assert run.tree.scores[local] == paths[response].score
            own = set(run.responses.tolist())
            of_item = view(dataset[group], sharing, bundle.item).pairs.tolist()
            inside = [p for p in of_item if {pairs[p].chosen, pairs[p].rejected} <= own]
            assert run.pairs.tolist() == inside
            sides = run.responses[run.tree.pairs]
            assert sides.tolist() == [[pairs[p].chosen, pairs[p].rejected] for p in inside]
        for item, bundle in whole.items():
            expected = view(dataset[group], sharing, item).responses.tolist()
            assert responses[item] == Counter(expected)
            assert extra[item] == bundle.num_tokens
    assert cut or more


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_the_columns_of_all_parts_are_those_of_every_group(dataset, capacity, sharing):
    group, tokens, repeated = all_parts(dataset, sharing, capacity)
    bundles = [
        bundle
        for g in range(len(dataset))
        for bundle in bundles_of(dataset, g, sharing, limits(capacity))
    ]
    assert group.tolist() == [bundle.group for bundle in bundles]
    assert tokens.tolist() == [bundle.num_tokens for bundle in bundles]
    assert repeated.tolist() == [b.part.repeated if b.part else 0 for b in bundles]


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_the_work_of_a_part_is_that_of_its_row(dataset, capacity, sharing):
    for group in range(len(dataset)):
        for bundle in bundles_of(dataset, group, sharing, limits(capacity)):
            tree = view(dataset[group], sharing, bundle.item, bundle.part).tree
            ends, area, predicting = {}, 0, set()
            for node, parent in enumerate(tree.parents.tolist()):
                length, above = int(tree.node_lengths[node]), ends.get(parent, 0)
                ends[node] = above + length
                area += length * above + length * (length + 1) // 2
            last = tree.node_offsets[1:] - 1
            for response in range(tree.num_responses):
                for node in tree.response_nodes(response):
                    start, end = tree.node_offsets[node], tree.node_offsets[node + 1]
                    predicting |= {int(last[tree.parents[node]]), *range(start, end - 1)}
            work = bundle_work(dataset, bundle, sharing)
            assert (work.tokens, work.area) == (tree.num_tokens, area)
            assert work.logit_tokens == len(predicting)


def sampler(dataset, composition, sharing, **kwargs):
    return Sampler(
        dataset=dataset,
        composition=composition,
        sharing=sharing,
        oversized="split",
        cost=CostModel(per_token=1.0, per_entry=0.1, per_logit_token=2.0),
        **kwargs,
    )


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize(
    ("num_ranks", "size"), [(1, {}), (3, {}), (2, {"micro_batch_size": 1}), (1, {"count": 4})]
)
def test_a_steps_rows_hold_all_parts_over_all_ranks(
    dataset, groups, capacity, sharing, num_ranks, size
):
    order = GroupBatches(len(dataset), 7, dataset.fingerprint, 3)
    size = {"row_capacity": capacity} | {
        "count_multiple" if k == "count" else k: v for k, v in size.items()
    }
    split = sampler(dataset, order, sharing, num_ranks=num_ranks, **size)
    large = Sampler(dataset=dataset, composition=order, sharing=sharing, row_capacity=10_000)
    repeated = divided = 0
    for step in range(12):
        plan, whole = split.step(step), large.step(step)
        divided += plan.is_divided
        assert not whole.is_divided
        assert plan.groups.tolist() == whole.groups.tolist()
        assert plan.denominators == whole.denominators
        rows = [row for rank in range(num_ranks) for row in split.micro_batches(plan, rank)]
        ids = Counter(map(tuple, np.concatenate([row.response_ids for row in rows]).tolist()))
        reference = large.micro_batches(whole)
        assert ids == Counter(
            map(tuple, np.concatenate([row.response_ids for row in reference]).tolist())
        )
        tokens = sum(row.num_tokens for row in rows)
        assert tokens - plan.repeated_tokens == sum(row.num_tokens for row in reference)
        repeated += plan.repeated_tokens
        assert len({len(rank) for rank in plan.rows}) == 1
    assert divided and (repeated > 0) == (sharing in ("tree", "pair"))


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("sort_by_length", [False, True])
def test_steps_of_rows_keep_a_groups_parts_together(
    dataset, groups, capacity, sharing, sort_by_length
):
    settings = StepSettings(
        sharing=sharing,
        row_capacity=capacity,
        rows_per_step=32,
        sort_by_length=sort_by_length,
        **SETTINGS,
    )
    order = settings.composition(dataset)
    assert isinstance(order, PartBatches)
    steps = order.num_steps(1)
    plans = [sampler(dataset, order, sharing, row_capacity=capacity).step(s) for s in range(steps)]
    assert sorted(np.concatenate([plan.groups for plan in plans]).tolist()) == list(range(SEEDS))
    for plan in plans:
        assert len(plan.rows[0]) <= 32
        wanted = [
            b for g in plan.groups for b in bundles_of(dataset, int(g), sharing, limits(capacity))
        ]
        bundles = [bundle for row in plan.rows[0] for bundle in row]
        assert Counter(replace(b, slot=0) for b in bundles) == Counter(wanted)
        assert all(sum(b.num_tokens for b in row) <= capacity for row in plan.rows[0])
    other = sampler(dataset, order, "none", micro_batch_size=2).step(0)
    assert other.groups.tolist() == plans[0].groups.tolist()


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("size", [{"global_batch_size": 7}, {"rows_per_step": 32}])
def test_a_plan_on_disk_has_the_same_rows(dataset, capacity, tmp_path, sharing, size):
    settings = StepSettings(sharing=sharing, row_capacity=capacity, **size, **SETTINGS)
    manifest = write_packed_steps(dataset, settings, tmp_path / "plan")
    plan = PackedSteps(tmp_path / "plan")
    verify_packed_steps(plan, dataset)
    plan.check(dataset, settings, None)
    alone = sampler(dataset, settings.composition(dataset), sharing, row_capacity=capacity)
    packed = sampler(dataset, plan, sharing, row_capacity=capacity)
    repeated = 0
    for step in range(plan.num_steps(2)):
        assert packed.step(step).rows == alone.step(step).rows
        repeated += packed.step(step).repeated_tokens
    assert manifest["repeated_tokens"] == repeated
    assert f"{repeated:,} tokens repeated" in describe_packed_steps(manifest)
    with pytest.raises(InputError, match=r"data\.oversized is error and was split when packed"):
        plan.check(dataset, StepSettings(**{**vars(settings), "oversized": "error"}), None)


def test_in_steps():
    sizes = [1, 1, 3, 1, 1, 1]
    blocks = [Block(np.array([i]), [np.array([0])] * n) for i, n in enumerate(sizes)]
    steps = in_steps(blocks, 4)
    assert [[int(block.groups[0]) for block in step] for step in steps] == [[0, 1, 3, 4], [2, 5]]


def test_one_row_per_step_cannot_hold_two_parts(dataset, capacity):
    settings = StepSettings(row_capacity=capacity, rows_per_step=1, **SETTINGS)
    with pytest.raises(InputError, match=r"rows_per_step is 1 and group \d+ .* needs \d+ rows"):
        settings.composition(dataset)


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_path_over_the_capacity_stays_an_error(tmp_path, sharing, micro_batch_size):
    paths = [path([1, 2, 3, *[4] * n], 3) for n in (2, 3, 9)]
    pairs = [Pair(chosen=0, rejected=1), Pair(chosen=1, rejected=2)]
    dataset = write_groups(tmp_path / "long", [(paths[:2], pairs[:1]), (paths, pairs)])
    order = GroupBatches(2, 1, dataset.fingerprint, 0)

    def make(capacity):
        return sampler(
            dataset, order, sharing, row_capacity=capacity, micro_batch_size=micro_batch_size
        )

    with pytest.raises(InputError, match=r"row_capacity is 11 and a response of group 1 .* has 12"):
        make(11)
    assert make(12).step(0).groups.size
    if micro_batch_size is None:
        settings = StepSettings(sharing=sharing, row_capacity=11, global_batch_size=1, **SETTINGS)
        with pytest.raises(InputError, match="needs 12 tokens for one response"):
            write_packed_steps(dataset, settings, tmp_path / "plan")


def test_responses_without_a_pair_need_no_room_if_they_do_not_run(tmp_path):
    paths = [path([1, 2, 3, *[4] * n], 3) for n in (2, 3, 9)]
    dataset = write_groups(tmp_path / "long", [(paths, [Pair(chosen=0, rejected=1)])])
    order = GroupBatches(1, 1, dataset.fingerprint, 0)
    for sharing in ("none", "pair"):
        sampler(dataset, order, sharing, row_capacity=6)
    with pytest.raises(InputError, match="has 12 tokens"):
        sampler(dataset, order, "tree", row_capacity=6)
