"""`inspect PLAN --verify`: a sealed plan whose entries are wrong is still seen."""

import json
import shutil

import numpy as np
import pytest
from data_sets import inspect, random_tree, write

from megatron_prefix.data.files.checksums import file_entry, manifest_digest
from megatron_prefix.data.steps.compositions.settings import StepSettings
from megatron_prefix.data.steps.packed.writing import write_packed_steps
from megatron_prefix.data.store.dataset import PreferenceDataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    rng = np.random.default_rng(1)
    write(folder / "set", [random_tree(rng) for _ in range(20)])
    write(folder / "other", [random_tree(rng) for _ in range(20)])
    for sharing in ("tree", "pair"):
        settings = StepSettings(
            seed=1, sharing=sharing, row_capacity=50, global_batch_size=4, epochs=2
        )
        write_packed_steps(PreferenceDataset(folder / "set"), settings, folder / sharing)
    return folder


def seal(plan, change=None):
    """Make the checksums fit again."""
    manifest = json.loads((plan / "plan.json").read_text())
    manifest["files"] = {name: file_entry(plan / name) for name in manifest["files"]}
    if change:
        manifest.update(change)
    manifest["sha256"] = manifest_digest(manifest)
    (plan / "plan.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("sharing", ["tree", "pair"])
def test_a_sound_plan(folder, capsys, sharing):
    plan = folder / sharing
    code, out, _ = inspect(capsys, plan, "--verify", "--data", folder / "set", "--json")
    values = json.loads(out)
    assert code == 0 and values["verified"] and values["plan"]["counts"]["groups"] == 40
    code, out, _ = inspect(capsys, plan, "--verify")
    assert code == 0 and "10 steps are correct" in out and f"sharing {sharing}" in out
    code, _, err = inspect(capsys, plan, "--verify", "--data", folder / "other")
    assert code == 2 and "does not match" in err


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("groups", 0, 99, "outside the data set"),
        ("groups", 0, -1, "outside the data set"),
        ("groups", slice(0, 2), 3, " in 2 epochs"),
        ("items", 0, 3, "is not a packing of its groups"),
        ("row_items", 1, 0, "row_items.npy: offsets do not ascend"),
        ("step_groups", 0, 1, "step_groups.npy: offsets do not ascend"),
        ("step_rows", -1, 1, "step_rows.npy: offsets do not ascend"),
    ],
)
def test_wrong_entries_are_seen(folder, tmp_path, capsys, name, at, value, message):
    plan = tmp_path / "plan"
    shutil.copytree(folder / "tree", plan)
    column = np.load(plan / f"{name}.npy", mmap_mode="r+")
    if name == "items":
        value = column[1]
    column[at] = value
    column.flush()
    assert inspect(capsys, plan, "--verify")[0] == 2, "checksums"
    seal(plan)
    code, _, err = inspect(capsys, plan, "--verify")
    assert code == 2 and message in err


def test_rows_that_do_not_fit_and_wrong_counts_are_found_with_the_data_set(
    folder, tmp_path, capsys
):
    plan = tmp_path / "plan"
    shutil.copytree(folder / "tree", plan)
    settings = json.loads((plan / "plan.json").read_text())["settings"]
    longest = int(PreferenceDataset(folder / "set").groups_num_tokens().max())
    seal(plan, {"settings": {**settings, "row_capacity": longest}})
    code, _, err = inspect(capsys, plan, "--verify", "--data", folder / "set")
    assert code == 2 and f"and its rows hold {longest}" in err
    seal(plan, {"settings": settings, "fill": 0.5})
    code, _, err = inspect(capsys, plan, "--verify", "--data", folder / "set")
    assert code == 2 and "fill is 0.5, and " in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tree", 0], "--tree is for a data set"),
        (["--row", 0], "--row is for a data set"),
        (["--row-capacity", 9], "--row-capacity is for a data set"),
        (["--picture", "x.png"], "--picture is for a data set"),
        (["--data", "x"], "--data needs --verify"),
    ],
)
def test_flags_that_have_no_effect_on_a_plan(folder, capsys, flags, message):
    code, _, err = inspect(capsys, folder / "tree", *flags)
    assert code == 2 and message in err
