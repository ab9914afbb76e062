"""A plan on disk against the steps that a sampler plans by itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
from data_sets import random_group, write_groups

from megatron_prefix.__main__ import main
from megatron_prefix.data.steps.compositions.settings import StepSettings
from megatron_prefix.data.steps.packed.reading import PackedSteps, describe_packed_steps
from megatron_prefix.data.steps.packed.writing import write_packed_steps
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import SHARING_MODES, group_lengths
from megatron_prefix.errors import InputError

GROUPS = 30
SETTINGS = StepSettings(seed=3, row_capacity=900, global_batch_size=7, epochs=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    groups = [random_group(np.random.default_rng([4, seed])) for seed in range(GROUPS)]
    return write_groups(tmp_path_factory.mktemp("plan") / "random", groups)


def sampler(dataset, settings, composition, num_ranks=1):
    return Sampler(
        dataset=dataset,
        composition=composition,
        sharing=settings.sharing,
        row_capacity=settings.row_capacity,
        packing_method=settings.packing_method,
        num_ranks=num_ranks,
    )


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("size", [{"global_batch_size": 7}, {"rows_per_step": 2}])
@pytest.mark.parametrize("sort_by_length", [False, True])
@pytest.mark.parametrize("method", ["first-fit", "best-fit"])
def test_a_plan_has_the_steps_of_a_run_without_it(
    dataset, tmp_path, sharing, size, sort_by_length, method
):
    settings = StepSettings(
        seed=3,
        sharing=sharing,
        row_capacity=max(900, int(group_lengths(dataset, sharing).max())),
        sort_by_length=sort_by_length,
        packing_method=method,
        epochs=2,
        **size,
    )
    manifest = write_packed_steps(dataset, settings, tmp_path / "plan")
    plan = PackedSteps(tmp_path / "plan")
    plan.verify()
    plan.check(dataset, settings, None)
    composition = settings.composition(dataset)
    assert plan.num_steps(2) == composition.num_steps(2) == manifest["counts"]["steps"]
    seen = np.zeros(GROUPS, int)
    for num_ranks in (1, 2, 3):
        with_plan = sampler(dataset, settings, plan, num_ranks)
        alone = sampler(dataset, settings, composition, num_ranks)
        for step in range(plan.num_steps(2)):
            ours, theirs = with_plan.step(step), alone.step(step)
            assert ours.groups.tolist() == theirs.groups.tolist()
            assert ours.rows == theirs.rows
            assert (ours.denominators, ours.costs) == (theirs.denominators, theirs.costs)
            np.add.at(seen, ours.groups, num_ranks == 1)
    assert seen.tolist() == [2] * GROUPS
    assert 0 < manifest["fill"] <= 1 and manifest["row_max_over_mean"] >= 1
    assert f"{manifest['counts']['rows']:,} rows" in describe_packed_steps(manifest)


def test_sorted_steps_hold_groups_of_similar_length(dataset):
    lengths = dataset.groups_num_tokens()
    settings = replace(SETTINGS, sort_by_length=True, epochs=None)
    steps = settings.composition(dataset)
    assert steps.num_steps(2) == 2 * 5
    for epoch in (0, 1):
        groups = [steps.groups(step) for step in range(5 * epoch, 5 * epoch + 5)]
        assert sorted(g for step in groups for g in step.tolist()) == list(range(GROUPS))
        spans = sorted((lengths[step].min(), lengths[step].max(), len(step)) for step in groups)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        assert [size for *_, size in spans] == [7, 7, 7, 7, 2]
    orders = {tuple(len(steps.groups(5 * e + s)) for s in range(5)) for e in range(8)}
    assert len(orders) > 1  # the short step has no place of its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "data.seed is 4 and was 3 when packed"),
        ({"row_capacity": 901}, "data.row_capacity is 901 and was 900 when packed"),
        ({"global_batch_size": 8}, "data.global_batch_size is 8 and was 7 when packed"),
        ({"sharing": "pair"}, "data.sharing is pair and was tree when packed"),
        ({"sort_by_length": True}, "data.sort_by_length is True and was False when packed"),
        (
            {"packing_method": "best-fit"},
            "best-fit and was first-fit when packed",
        ),
        ({"epochs": 3}, "train.epochs is 3 and was 2 when packed"),
    ],
)
def test_another_setting_is_refused_with_both_values(dataset, tmp_path, change, message):
    write_packed_steps(dataset, SETTINGS, tmp_path / "plan")
    with pytest.raises(InputError, match=message):
        PackedSteps(tmp_path / "plan").check(dataset, replace(SETTINGS, **change), None)


def test_other_data_and_too_many_steps_are_refused(dataset, tmp_path):
    write_packed_steps(dataset, SETTINGS, tmp_path / "plan")
    plan = PackedSteps(tmp_path / "plan")
    other = write_groups(
        tmp_path / "other", [random_group(np.random.default_rng(9)) for _ in range(4)]
    )
    with pytest.raises(InputError, match=f"{other.fingerprint[:16]}… of 4 groups and was"):
        plan.check(other, SETTINGS, None)
    counted = replace(SETTINGS, epochs=None)
    plan.check(dataset, counted, 8)  # 60 groups: eight steps of seven, and one of four
    with pytest.raises(InputError, match="has 8 whole steps, and train.steps is 9"):
        plan.check(dataset, counted, 9)
    with pytest.raises(InputError, match="--row-capacity is 5 and group .* needs"):
        write_packed_steps(dataset, replace(SETTINGS, row_capacity=5), tmp_path / "small")
    assert sorted(p.name for p in tmp_path.glob("*")) == [
        *("other.bin", "other.idx", "other.json", "other.tree", "plan")
    ]


def test_damage_is_found(dataset, tmp_path):
    path = tmp_path / "plan"
    write_packed_steps(dataset, SETTINGS, path)
    with pytest.raises(InputError, match="there are no packed steps in .*absent"):
        PackedSteps(tmp_path / "absent")
    column = path / "groups.npy"
    good = bytearray(column.read_bytes())
    column.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InputError, match="groups.npy is damaged"):
        PackedSteps(path, check=False).verify()
    with pytest.raises(InputError, match="groups.npy names a group outside"):
        PackedSteps(path)
    column.write_bytes(good[:-8])
    with pytest.raises(InputError, match="groups.npy"):
        PackedSteps(path)
    column.write_bytes(good)
    items = np.load(path / "items.npy", mmap_mode="r+")
    items[0] = items[1]
    items.flush()
    with pytest.raises(InputError, match="step 0 is not a packing of its groups"):
        PackedSteps(path)
    plan = PackedSteps(path, check=False)
    with pytest.raises(InputError, match="step 0 is not a packing of its groups"):
        sampler(dataset, SETTINGS, plan).step(0)
    manifest = json.loads((path / "plan.json").read_text())
    manifest["settings"]["seed"] = 4
    (path / "plan.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="plan.json is damaged or was changed"):
        PackedSteps(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "plan.json is not a manifest that megatron-prefix pack wrote"),
        ({"version": 9}, "has version 9, and this program reads version 1: pack again"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(dataset, tmp_path, change, message):
    write_packed_steps(dataset, SETTINGS, tmp_path / "plan")
    file = tmp_path / "plan" / "plan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        PackedSteps(tmp_path / "plan")
    file.write_text("{")
    with pytest.raises(InputError, match=r"plan.json cannot be read .*: pack again"):
        PackedSteps(tmp_path / "plan")


def test_changed_files_are_distinguished_from_unchanged_ones(dataset, tmp_path):
    write_packed_steps(dataset, SETTINGS, tmp_path / "plan")
    plan = PackedSteps(tmp_path / "plan")
    assert plan.is_of_these_files(dataset)
    path = dataset.prefix.with_name(f"{dataset.prefix.name}.bin")
    path.write_bytes(path.read_bytes())
    assert not plan.is_of_these_files(dataset)


def test_the_command_packs_and_replaces_only_plans(dataset, tmp_path, capsys):
    output = tmp_path / "plan"
    argv = ["pack", str(dataset.prefix), "--output", str(output), "--row-capacity", "900"]
    for seed in ("3", "4"):
        assert main([*argv, "--global-batch-size", "7", "--epochs", "2", "--seed", seed]) == 0
    printed = capsys.readouterr().out
    assert "packed: 9 steps" in printed and "fill" in printed
    assert PackedSteps(output).manifest["settings"]["seed"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]
    assert main(argv) == 2
    (tmp_path / "mine").mkdir()
    argv[3] = str(tmp_path / "mine")
    assert main([*argv, "--rows-per-step", "2"]) == 2
    assert "exists and does not hold packed steps" in capsys.readouterr().err
