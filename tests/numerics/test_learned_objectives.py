"""Every objective, from a YAML file on the quickstart's data, learns which answer is better.

Model, batches and optimizer are those of examples/quickstart/dpo.yaml; an objective that needs
other settings has them in OWN. docs/losses.md has the accuracies.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import lines
from toy import ROOT

from megatron_prefix.__main__ import main
from megatron_prefix.objectives.registry import OBJECTIVES

STEPS = 16
ENOUGH = 0.9
KINDS = [
    *((name, record.model) for name, record in OBJECTIVES.items()),
    *((name, "reward") for name, record in OBJECTIVES.items() if record.reward_variant),
]
LISTS = {
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "CPO-SimPO": {"loss_type": ["simpo", "sft"], "beta": 2.0},
    "sets and sft": {"loss_type": ["plackett_luce", "sft"], "loss_weights": [1.0, 0.1]},
}
OWN: dict[str, dict] = {
    # With its default of 0.05 the loss rises with the margin near 0, so the first steps teach the
    # opposite, and the loss has a minimum there.
    "discopop, lm": {"loss": {"discopop_tau": 0.2}},
    # A head that is drawn at random begins far from the scores 1 and 0.
    "regression, reward": {"train": {"steps": 32, "eval_interval": 32}},
    # Scores 1 and 0 at temperature 1 are targets of 0.73 and 0.27: almost the same.
    "nca, reward": {"loss": {"temperature": 0.2}, "train": {"steps": 32, "eval_interval": 32}},
}
"""Sections that go on top, by name."""
LABELLED = ("kto", "apo_zero_unpaired", "bco")
"""Trained on single responses with a label; held-out are pairs."""
CASES = {
    **{f"{x}, {kind}": {"loss": {"loss_type": x}, "model": {"kind": kind}} for x, kind in KINDS},
    **{f"{name}, list": {"loss": loss} for name, loss in LISTS.items()},
}
FAST = ("plackett_luce, lm", "kto, lm", "bradley_terry, reward")
SMALL = {"model": {"num_layers": 2}, "train": {"steps": 10, "eval_interval": 10}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """The quickstart's records, also with scores and margins, and as single responses."""
    folder = tmp_path_factory.mktemp("toy")
    command = [sys.executable, ROOT / "tools" / "make_toy_preferences.py", "--output", folder]
    sizes = ["--num-train", "400", "--num-valid", "100"]
    subprocess.run([*command, *sizes], check=True, capture_output=True)
    for name in ("train", "valid"):
        source = folder / f"{name}.jsonl"
        scores = {"score_chosen": 1.0, "score_rejected": 0.0, "margin": 0.5}
        write(source, [record | scores for record in records_of(source)])
        assert main(["build", *files(source, folder / name)]) == 0
    labelled = [
        {"prompt": x["prompt"], "completion": x[side], "label": side == "chosen"}
        for x in records_of(folder / "train.jsonl")
        for side in ("chosen", "rejected")
    ]
    write(folder / "labelled.jsonl", labelled)
    assert main(["build", *files(folder / "labelled.jsonl", folder / "labelled")]) == 0
    return folder


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(x) + "\n" for x in records), encoding="utf-8")


def files(source: Path, output: Path) -> list[str]:
    return ["--input", str(source), "--tokenizer", "bytes", "--output", str(output), "--kto"]


def accuracy(toy: Path, output: Path, name: str, **more: dict) -> float:
    """Share of held-out pairs whose better answer has the larger reward, after a run of the
    command."""
    sections = yaml.safe_load((ROOT / "examples/quickstart/dpo.yaml").read_text("utf-8"))
    train = "labelled" if name.split(",")[0] in LABELLED else "train"
    parts = (
        {
            "data": {"train": str(toy / train), "valid": str(toy / "valid")},
            "train": {"steps": STEPS, "eval_interval": STEPS, "save": None},
            "logging": {"output": str(output / "run")},
        },
        CASES[name],
        OWN.get(name, {}),
        more,
    )
    del sections["loss"]  # its beta is not an option of all
    for part in parts:
        for section, keys in part.items():
            sections.setdefault(section, {}).update(keys)
    path = output / "run.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    assert main(["train", "--config", str(path)]) == 0
    return lines(output / "run")[-1]["eval_rewards/accuracies"]


def test_every_objective_has_a_case():
    assert {name.split(",")[0] for name in CASES} >= OBJECTIVES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_objective_learns(toy, tmp_path, name):
    value = accuracy(toy, tmp_path, name)
    print(f"ACCURACY {name}: {value}")
    assert value > ENOUGH


@pytest.mark.parametrize("name", FAST)
def test_a_sample_learns_in_a_few_steps(toy, tmp_path, name):
    """With half of the layers."""
    assert accuracy(toy, tmp_path, name, **SMALL) > ENOUGH
