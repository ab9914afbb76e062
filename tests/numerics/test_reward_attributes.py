"""Reward models with a score for each attribute: data, runs in layouts of rows, transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from attribute_sets import NAMES, write_attributes
from small_runs import configure, saved_weights, trained
from test_hf_parity import responses, run_config
from test_hf_reward_parity import TOLERANCE, make_reward

from megatron_prefix.__main__ import main
from megatron_prefix.checkpoint.convert import export_hf, import_hf
from megatron_prefix.config import parse_config
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.run import train

REWARD = {"kind": "reward", "num_labels": 3, "init_method_std": 0.05}
LAYOUTS = {
    "tree": {"row_capacity": 200},
    "none": {"sharing": "none", "row_capacity": 200},
    "unpacked": {
        "sharing": "none",
        "packing": False,
        "row_capacity": None,
        "micro_batch_size": 6,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_attributes(tmp_path_factory.mktemp("attributes"), "set", 0, 12)


def test_the_data_set_has_them(data):
    dataset = PreferenceDataset(data)
    assert dataset.attribute_names == NAMES
    lines = Path(f"{data}.jsonl").read_text().splitlines()
    answers = [x for line in lines for x in json.loads(line)["answers"]]
    expected = np.array([[np.nan if x[n] is None else x[n] for n in NAMES] for x in answers])
    np.testing.assert_array_equal(dataset.response_attributes, expected)
    assert np.isnan(expected).any() and not dataset.manifest["report"]["unread"]


def settings(output: Path, data: str, layout: str = "tree", **sections):
    sections = {"loss": {"loss_type": "regression", "attribute": 0}, "model": {}, **sections}
    return configure(
        output,
        data,
        data={"valid": data, "global_batch_size": 4, **LAYOUTS[layout]},
        model={**REWARD, **sections["model"]},
        loss=sections["loss"],
        train={"steps": 8, "save": str(output / "saved")},
    )


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, tuple]:
    folder = tmp_path_factory.mktemp("runs")
    results = {}
    for layout in LAYOUTS:
        config = settings(folder / layout, data, layout)
        results[layout] = trained(config), saved_weights(config.train.save, 8), config
    return results


@pytest.mark.parametrize("layout", ["tree", "none"])
def test_rows_change_nothing(runs, layout):
    for a, b in zip(runs[layout][0], runs["unpacked"][0], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if "mse" in key or "rewards" in key or key in ("loss", "grad_norm", "eval_loss"):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (a["step"], key)
    for name, weight in runs["unpacked"][1].items():
        assert (runs[layout][1][name] - weight).abs().max() <= 1e-4, name
    for step in (line for line in runs[layout][0] if "loss" in line):
        assert step["loss"] == pytest.approx(step["mse"], rel=1e-9), "the divisor counts labels"


def test_metrics_are_means_over_known_labels(runs, data, tmp_path):
    """Of every attribute, from the scores that evaluate writes; and one step by hand."""
    config = runs["tree"][2]
    file = tmp_path / "scored.jsonl"
    metrics = evaluate(config, config.train.save, str(file))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    scores = np.array([[record["attributes"][name] for name in NAMES] for record in records])
    assert [record["reward"] for record in records] == scores[:, 0].tolist()
    errors = (scores - PreferenceDataset(data).response_attributes) ** 2
    for i, name in enumerate(NAMES):
        assert metrics[f"mse/{name}"] == pytest.approx(np.nanmean(errors[:, i]), rel=1e-6)
    for key in ("loss", "mse"):
        assert metrics[key] == pytest.approx(np.nanmean(errors), rel=1e-6)
    first, last = (runs["tree"][0][i] for i in (0, -1))
    assert last["eval_mse/helpfulness"] < 0.7 * first["eval_mse/helpfulness"]
    assert last["eval_loss"] == pytest.approx(metrics["loss"], rel=1e-6)


def test_rewards_are_of_the_chosen_attribute(runs, tmp_path):
    config = runs["tree"][2]
    metrics = {}
    for attribute in (0, 1):
        other = replace(config, loss=replace(config.loss, attribute=attribute))
        metrics[attribute] = evaluate(other, config.train.save, None)
    assert metrics[0]["loss"] == metrics[1]["loss"]
    assert metrics[0]["rewards/margins"] != pytest.approx(metrics[1]["rewards/margins"], rel=0.01)


def judged(directory: Path, prefix: str) -> np.ndarray:
    """Scores [R, A] by transformers."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    assert model.config.num_labels == 3
    with torch.no_grad():
        return np.array(
            [
                model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].tolist()
                for tokens, _ in responses(prefix)
            ]
        )


def scored(config, output: Path, load: str | None) -> np.ndarray:
    file = output / "scored.jsonl"
    evaluate(config, load, str(file))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return np.array([[record["attributes"][name] for name in NAMES] for record in records])


def test_transformers_gives_the_same_scores(data, tmp_path):
    """Scores in, straight and through a checkpoint; scores out, after training."""
    directory = make_reward("llama 3", tmp_path / "hf", num_labels=3)
    import_hf(str(directory), tmp_path / "ck")
    theirs = judged(directory, data)
    loss = {"loss_type": "regression"}
    for origin in ({"checkpoint": str(tmp_path / "ck")}, {"hf": str(directory)}):
        config = run_config(tmp_path, data, kind="reward", num_labels=3, **origin)
        config = replace(config, loss=replace(config.loss, **loss))
        assert np.abs(scored(config, tmp_path, None) - theirs).max() < TOLERANCE
    train(config)
    saved = str(tmp_path / "run" / "saved")
    export_hf(saved, tmp_path / "out", 10**9)
    after = judged(tmp_path / "out", data)
    assert np.abs(scored(config, tmp_path, saved) - after).max() < TOLERANCE
    assert np.abs(after - theirs).max() > 100 * TOLERANCE, "training moved nothing"


def test_a_model_from_sizes_is_exported(runs, data, tmp_path):
    config = runs["tree"][2]
    export_hf(config.train.save, tmp_path / "out", 10**9)
    ours = scored(config, tmp_path, config.train.save)
    assert np.abs(ours - judged(tmp_path / "out", data)).max() < TOLERANCE


def test_what_does_not_fit_is_refused(data, tmp_path):
    directory = make_reward("llama 3", tmp_path / "hf", num_labels=2)
    config = run_config(tmp_path, data, kind="reward", num_labels=3, hf=str(directory))
    config = replace(config, loss=replace(config.loss, loss_type="regression"))
    with pytest.raises(InputError, match="with 2 labels, and model.num_labels is 3: set model.num"):
        train(config)
    with pytest.raises(InputError, match="have 3 attributes, and model.num_labels is 4"):
        train(settings(tmp_path / "four", data, model={"num_labels": 4}))
    with pytest.raises(InputError, match="attributes of model.num_labels: 3 are 0 to 2"):
        train(settings(tmp_path / "out", data, loss={"loss_type": "regression", "attribute": 3}))
    with pytest.raises(InputError, match="bradley_terry trains one score per response"):
        train(settings(tmp_path / "bt", data, loss={"loss_type": "bradley_terry"}))
    one = {"loss_type": "regression", "attribute": 0}
    with pytest.raises(InputError, match="has no effect with model.num_labels: 1"):
        train(settings(tmp_path / "one", data, loss=one, model={"num_labels": 1}))
    split = settings(tmp_path / "split", data)
    with pytest.raises(InputError, match="data.oversized = split with model.num_labels = 3"):
        parse_config(
            yaml.safe_load(split.to_yaml().replace("oversized: error", "oversized: split"))
        )
    with pytest.raises(InputError, match="model.kind is lm: set model.kind: reward"):
        settings(tmp_path / "lm", data, loss={}, model={"kind": "lm"})


def test_a_build_without_them_is_refused(data, tmp_path, capsys):
    """A pair has no responses with attributes, and merged groups keep none."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a ", "chosen": "b", "rejected": "c"}) + "\n")
    base = ["build", "--tokenizer", "bytes", "--output", str(tmp_path / "out"), "--attributes"]
    assert main([*base, "tone", "--input", str(pairs)]) == 2
    assert "responses of format 'trl' have none" in capsys.readouterr().err
    assert main([*base, "tone", "--merge-prompts", "--input", f"{data}.jsonl"]) == 2
    assert "merged groups keep no attributes" in capsys.readouterr().err
    assert main([*base, "tone", "tone", "--input", f"{data}.jsonl"]) == 2
    assert "a name is given twice" in capsys.readouterr().err
    assert main([*base, "nothing", "--input", f"{data}.jsonl"]) == 0
    config = settings(tmp_path / "run", str(tmp_path / "out"), model={"num_labels": 2})
    with pytest.raises(InputError, match="have 1 attributes, and model.num_labels is 2"):
        train(config)
