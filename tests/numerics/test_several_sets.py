"""Runs on several data sets: resume, plan, sidecar and evaluation by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from small_runs import configure, lines, timeless, trained

from megatron_prefix.__main__ import main
from megatron_prefix.checkpoint.save_load import TRACKER, iteration_dir
from megatron_prefix.data.steps.packed import write_packed_steps
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.run import train
from megatron_prefix.train.samplers import plan_settings
from megatron_prefix.train.scoring import score_reference

STEPS, CUT = 6, 3
MIXTURES = {
    "weights": ({"weight": 2}, {"weight": 1}, {"train": {"steps": STEPS}}),
    "epochs": ({"epochs": 1.5}, {"epochs": 0.75}, {"train": {"steps": None, "epochs": 1}}),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {
        name: str(write_random_set(folder / name, seed, count))
        for name, seed, count in (("a", 1, 12), ("b", 2, 8), ("held", 3, 4), ("other", 4, 3))
    }


def mixture(output: Path, sets: dict[str, str], kind: str, **more):
    first, second, sections = MIXTURES[kind]
    listed = [{"prefix": sets["a"], **first}, {"prefix": sets["b"], **second}]
    data = {"train": listed, "valid": {"held": sets["held"], "x.2": sets["other"]}}
    run = {**sections["train"], "save": str(output / "saved"), "save_interval": CUT}
    run |= {"eval_interval": CUT, **more.pop("train", {})}
    data |= more.pop("data", {})
    return configure(output, "unused", data=data, train=run, **more)


@pytest.fixture(scope="module")
def finished(sets, tmp_path_factory):
    """Finished runs by kind of mixture."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in MIXTURES:
        train(mixture(folder / kind, sets, kind))
    return folder


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_resumed_run_has_the_same_steps(finished, sets, tmp_path, kind):
    whole, cut = lines(finished / kind), tmp_path / "cut"
    last = whole[-1]["step"]
    shutil.copytree(finished / kind, cut)
    shutil.rmtree(iteration_dir(cut / "saved", last))
    (cut / "saved" / TRACKER).write_text(str(CUT))
    resumed = trained(mixture(cut, sets, kind, train={"load": str(cut / "saved")}))
    assert timeless(resumed) == timeless(whole)
    assert last == (STEPS if kind == "weights" else (18 + 6) // 4)


def test_another_mixture_does_not_resume(finished, sets, tmp_path):
    config = mixture(tmp_path, sets, "weights", train={"load": str(finished / "weights" / "saved")})
    other = [{"prefix": sets["a"], "weight": 1}, {"prefix": sets["b"], "weight": 1}]
    swapped = [{"prefix": sets["b"], "weight": 2}, {"prefix": sets["a"], "weight": 1}]
    for listed, name in ((other, "data.train weights"), (swapped, "data.train fingerprint")):
        data = {"train": listed}
        with pytest.raises(InputError, match=name):
            train(mixture(tmp_path, sets, "weights", data=data, train={"load": config.train.load}))


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_plan_changes_nothing(finished, sets, tmp_path, kind):
    config = mixture(tmp_path / "run", sets, kind)
    dataset = join_datasets([PreferenceDataset(item.prefix) for item in config.data.train_sets])
    settings = plan_settings(config, check(config.loss))
    write_packed_steps(dataset, settings, tmp_path / "plan", steps=config.train.steps)
    rows = trained(mixture(tmp_path / "run", sets, kind, data={"plan": str(tmp_path / "plan")}))
    assert timeless(rows) == timeless(lines(finished / kind))


def test_one_sidecar_has_all_sets(finished, sets, tmp_path):
    path = str(tmp_path / "ref")
    score_reference(mixture(tmp_path / "score", sets, "weights"), path)
    loss = {"reference": "precomputed", "ref_logps": path}
    rows = trained(mixture(tmp_path / "run", sets, "weights", loss=loss))
    for ours, theirs in zip(timeless(rows), timeless(lines(finished / "weights")), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert math.isclose(ours[key], theirs[key], rel_tol=2e-4, abs_tol=2e-5), key
    two = {"train": sets["a"], "valid": None}
    score_reference(
        configure(tmp_path / "one", "unused", data=two, train={"steps": STEPS}), str(tmp_path / "1")
    )
    loss["ref_logps"] = str(tmp_path / "1")
    with pytest.raises(InputError, match="made from data sets a .* but .*b has fingerprint"):
        train(mixture(tmp_path / "refused", sets, "weights", loss=loss))


def test_metrics_and_records_have_the_names_of_their_sets(finished, sets, tmp_path):
    evaluations = [row for row in lines(finished / "weights") if "eval_held/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    load, path = str(finished / "weights" / "saved"), tmp_path / "records.jsonl"
    config = mixture(tmp_path, sets, "weights")
    metrics = evaluate(config, load, str(path))
    assert metrics == {
        key.removeprefix("eval_"): value
        for key, value in evaluations[-1].items()
        if key.startswith("eval_")
    }
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [*dict.fromkeys(record["set"] for record in records)] == ["held", "x.2"]
    alone = tmp_path / "alone.jsonl"
    config = mixture(tmp_path, sets, "weights", data={"valid": sets["other"]})
    single = evaluate(config, load, str(alone))
    assert single == {k[4:]: v for k, v in metrics.items() if k.startswith("x.2/")}
    own = [json.loads(line) for line in alone.read_text().splitlines()]
    assert own == [{k: v for k, v in r.items() if k != "set"} for r in records if r["set"] == "x.2"]


def test_the_run_writes_a_configuration_that_runs(finished, sets, tmp_path):
    raw = yaml.safe_load((finished / "weights" / "config.yaml").read_text())
    assert raw["data"]["train"] == [
        {"prefix": sets["a"], "weight": 2.0},
        {"prefix": sets["b"], "weight": 1.0},
    ]
    assert raw["data"]["valid"] == {"held": sets["held"], "x.2": sets["other"]}
    arguments = ["plan", "--config", str(finished / "weights" / "config.yaml"), "--json"]
    assert main(arguments) == 0
    assert main([*arguments, "data.train=[{prefix: nowhere, weight: 1}]"]) == 0
