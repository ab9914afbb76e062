"""Plans of several data sets: `pack --config`, the same steps as without a plan, and checks."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from data_sets import inspect, random_group, write_groups

from megatron_prefix.__main__ import main
from megatron_prefix.config import load_config
from megatron_prefix.data.files import file_entry, manifest_digest
from megatron_prefix.data.steps.compositions import StepSettings
from megatron_prefix.data.steps.packed import PackedSteps, verify_packed_steps
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(6)
    for name, count in (("a", 14), ("b", 6)):
        write_groups(folder / name, [random_group(rng) for _ in range(count)])
    return folder


KINDS = {
    "weights": ({"weight": 3}, {"weight": 1}, {"global_batch_size": 4}, {"steps": 11}),
    "epochs": ({"epochs": 1.5}, {"epochs": 2}, {"global_batch_size": 4}, {"epochs": 1}),
    "rows": ({"epochs": 1.5}, {"epochs": 2}, {"rows_per_step": 2}, {"epochs": 1}),
}


def configuration(folder, kind):
    first, second, data, train = KINDS[kind]
    sets = [{"prefix": str(folder / name), **own} for name, own in (("a", first), ("b", second))]
    raw = {
        "data": {"train": sets, "row_capacity": 700, "seed": 9, **data},
        "model": {
            "num_layers": 1,
            "hidden_size": 64,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
        },
        "optimizer": {"lr": 1e-3},
        "train": train,
        "logging": {"output": "nowhere"},
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def settings_of(config):
    data = config.data
    return StepSettings(
        seed=data.seed,
        row_capacity=data.row_capacity,
        global_batch_size=data.global_batch_size,
        rows_per_step=data.rows_per_step,
        epochs=config.train.epochs,
        weights=data.weights,
        set_epochs=data.set_epochs,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_has_the_steps_of_the_run(folder, tmp_path, kind, capsys):
    path = configuration(folder, kind)
    assert main(["pack", "--config", str(path), "--output", str(tmp_path / "plan")]) == 0
    assert "packed: " in capsys.readouterr().out
    config, plan = load_config(path), PackedSteps(tmp_path / "plan")
    dataset = join_datasets([PreferenceDataset(item.prefix) for item in config.data.train_sets])
    settings = settings_of(config)
    plan.check(dataset, settings, config.train.steps)
    assert all(plan.is_of_these_files(part) for part in dataset.parts)
    verify_packed_steps(plan)
    verify_packed_steps(plan, dataset)
    parts = {"dataset": dataset, "row_capacity": 700, "num_ranks": 2}
    own = Sampler(composition=settings.composition(dataset), **parts)
    packed = Sampler(composition=plan, **parts)
    num_steps = config.train.steps or own.composition.num_steps(1)
    assert plan.manifest["counts"]["steps"] == num_steps
    for step in range(num_steps):
        ours, theirs = own.step(step), packed.step(step)
        assert ours.groups.tolist() == theirs.groups.tolist()
        assert (ours.rows, ours.denominators) == (theirs.rows, theirs.denominators)


def test_a_plan_of_another_mixture_is_refused(folder, tmp_path):
    path = configuration(folder, "weights")
    assert main(["pack", "--config", str(path), "--output", str(tmp_path / "plan")]) == 0
    plan, config = PackedSteps(tmp_path / "plan"), load_config(path)
    dataset = join_datasets([PreferenceDataset(item.prefix) for item in config.data.train_sets])
    settings = settings_of(config)
    with pytest.raises(InputError, match="has 11 whole steps, and train.steps is 12"):
        plan.check(dataset, settings, 12)
    for other, message in (
        (StepSettings(**{**vars(settings), "weights": (1.0, 1.0)}), r"weights of data.train is \["),
        (StepSettings(**{**vars(settings), "weights": None}), "weights of data.train is None"),
        (StepSettings(**{**vars(settings), "seed": 1}), "data.seed is 1 and was 9"),
    ):
        with pytest.raises(InputError, match=message):
            plan.check(dataset, other, 11)
    with pytest.raises(InputError, match="data.train is .* when packed"):
        plan.check(join_datasets(dataset.parts[::-1]), settings, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_comes_too_often_is_seen(folder, tmp_path, capsys, kind):
    path = configuration(folder, kind)
    assert main(["pack", "--config", str(path), "--output", str(tmp_path / "plan")]) == 0
    groups = np.load(tmp_path / "plan" / "groups.npy", mmap_mode="r+")
    groups[0] = (groups[0] + 1) % 20
    groups.flush()
    manifest = json.loads((tmp_path / "plan" / "plan.json").read_text())
    manifest["files"]["groups.npy"] = file_entry(tmp_path / "plan" / "groups.npy")
    manifest["sha256"] = manifest_digest(manifest)
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(manifest))
    code, _, err = inspect(capsys, tmp_path / "plan", "--verify")
    assert code == 2 and " instead of" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--seed is set by --config: leave it out, or give data.seed=VALUE"),
        (["--epochs", "3"], "--epochs is set by --config: .* give train.epochs=VALUE"),
        (["train.steps=0"], "train.steps = 0"),
    ],
)
def test_flags_and_a_configuration_exclude_each_other(folder, capsys, arguments, message):
    path = configuration(folder, "weights")
    argv = ["pack", "--config", str(path), "--output", str(folder / "never"), *arguments]
    assert main(argv) == 2
    assert re.search(message, capsys.readouterr().err)


def test_one_data_set_by_configuration_gives_the_plan_of_the_flags(folder, tmp_path):
    path = configuration(folder, "weights")
    settings = [f"data.train={folder / 'a'}", "train.steps=7"]
    by_config, by_flags = tmp_path / "config", tmp_path / "flags"
    assert main(["pack", "--config", str(path), "--output", str(by_config), *settings]) == 0
    argv = ["pack", str(folder / "a"), "--output", str(by_flags), "--row-capacity", "700"]
    argv += ["--global-batch-size", "4", "--seed", "9", "--epochs", "3"]
    assert main(argv) == 0
    plans = [json.loads((p / "plan.json").read_text()) for p in (by_config, by_flags)]
    assert plans[0] == plans[1] and plans[0]["counts"]["whole_steps"] >= 7
    shutil.rmtree(by_flags)
    assert main(["pack", "--output", str(by_flags), "--row-capacity", "700"]) == 2
