"""Whole runs with several references: layouts of rows, resumed runs, evaluation, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranked_sets import write_ranked_set
from reference_files import write_references
from small_runs import configure, lines, saved_state, timeless, trained

from megatron_prefix.errors import InputError, RunError
from megatron_prefix.train.evaluation import evaluate

STEPS = 5
LAYOUTS = {
    "tree": {"sharing": "tree", "row_capacity": 200},
    "unpacked": {
        "sharing": "none",
        "packing": False,
        "row_capacity": None,
        "micro_batch_size": 6,
    },
}
LOSSES = {
    "harmonic adaptive": {"reference_mixture": "harmonic", "reference_weights": "adaptive"},
    "harmonic whole": {
        "reference_mixture": "harmonic",
        "reference_clip_split": False,
        "reference_weights": "validation_confidence",
    },
    "multi thompson": {
        "loss_type": ["ipo", "sft"],
        "reference_mixture": "multi_dpo",
        "reference_weights": "thompson",
        "comparisons": "best_vs_rest",
    },
    "geometric window": {
        "reference_mixture": "geometric",
        "reference_weights": "sliding_window",
        "reference_window": 9,
        "weighting": "group",
    },
    "sets": {
        "loss_type": "plackett_luce",
        "reference_mixture": "geometric",
        "reference_weights": [1.0, 0.0, 3.0],
    },
    "validation": {"reference_weights": "validation_accuracy"},
    "uniform": {},
}


STEP_LOSSES = {
    "aot": {
        "loss_type": ["aot", "sft"],
        "reference_mixture": "harmonic",
        "reference_weights": "sliding_window",
    },
    "aot multi": {"loss_type": "aot_unpaired", "reference_weights": "thompson"},
}


class Runs:
    def __init__(self, folder: Path, *, weighted: bool = True) -> None:
        self.folder = folder
        self.data = write_ranked_set(folder / "train", 0, 10, weighted=weighted)
        self.valid = write_ranked_set(folder / "valid", 1, 6, weighted=weighted)
        self.references = write_references(folder / "references", self.config("score", "tree", {}))
        self.known: dict[tuple[str, str], list[dict]] = {}

    def config(self, name: str, layout: str, loss: dict, **train):
        output = self.folder / name / layout
        return configure(
            output,
            self.data,
            data={"valid": self.valid, "global_batch_size": 4, **LAYOUTS[layout]},
            loss=loss,
            train={
                "steps": STEPS,
                "save": str(output / "saved"),
                "save_interval": 2,
                "eval_interval": 2,
                **train,
            },
        )

    def of(self, name: str, layout: str, **train):
        own = {**LOSSES, **STEP_LOSSES}[name]
        return self.config(name, layout, {"references": self.references, **own}, **train)

    def __call__(self, name: str, layout: str = "tree") -> list[dict]:
        if (name, layout) not in self.known:
            self.known[name, layout] = trained(self.of(name, layout))
        return self.known[name, layout]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Runs:
    """Runs on pairs without weights."""
    return Runs(tmp_path_factory.mktemp("plain"), weighted=False)


@pytest.mark.parametrize("name", [*LOSSES, *STEP_LOSSES])
def test_rows_change_nothing(request, name):
    runs = request.getfixturevalue("plain" if name in STEP_LOSSES else "runs")
    packed, unpacked = runs(name), runs(name, "unpacked")
    for a, b in zip(packed, unpacked, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
        for key in a:
            if "reference_" in key or "rewards/" in key:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (a["step"], key)
    assert packed[-1]["eval_loss"] < packed[0]["eval_loss"]


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_name_the_references(runs, name):
    step = next(line for line in runs(name) if "loss" in line)
    names = [reference["name"] for reference in runs.references]
    weights = [step[f"reference_weights/{x}"] for x in names]
    assert sum(weights) == pytest.approx(1)
    accuracies = [step[f"reference_accuracies/{x}"] for x in names]
    assert accuracies[2] > accuracies[0], "good is better than bad"
    if name in ("uniform", "geometric window"):
        assert weights == pytest.approx([1 / 3] * 3)  # nothing was seen before the first step
    if name == "sets":
        assert weights == pytest.approx([0.25, 0, 0.75])
    if name.startswith("validation"):
        assert weights[2] > weights[0]


def test_online_weights_move(runs):
    seen = {
        tuple(round(line[f"reference_weights/{x['name']}"], 6) for x in runs.references)
        for name in ("multi thompson", "geometric window")
        for line in runs(name)
        if "loss" in line
    }
    assert len(seen) > 4


@pytest.mark.parametrize("name", ["multi thompson", "geometric window"])
def test_a_resumed_run_replays_the_weights(runs, name):
    whole = runs(name)
    source = runs.folder / name / "tree"
    target = runs.folder / f"{name} resumed"
    shutil.copytree(source / "saved", target / "saved")
    for step in (4, 5):
        shutil.rmtree(target / "saved" / f"iter_{step:07d}")
    (target / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    config = runs.of(name, "tree", load=str(target / "saved"), save=str(target / "saved"))
    config = replace(config, logging=replace(config.logging, output=str(target)))
    resumed = timeless(trained(config))
    assert resumed == [line for line in timeless(whole) if line["step"] > 2]
    _, common = saved_state(source / "saved", 4)
    state = common["objective_state"]["references"]
    assert state["names"] == ["bad", "own", "good"] and np.sum(state["weights"]) == 1


def test_a_resumed_run_with_other_files_is_refused(runs):
    loss = {"references": runs.references[1:], **LOSSES["geometric window"]}
    saved = str(runs.folder / "geometric window" / "tree" / "saved")
    runs("geometric window")
    with pytest.raises(InputError, match=r"loss\.references: .*'bad'"):
        trained(runs.config("other", "tree", loss, load=saved, save=None, save_interval=None))


def test_evaluate_takes_the_weights_of_the_checkpoint(runs):
    name = "geometric window"
    last = runs(name)[-1]
    saved = str(runs.folder / name / "tree" / "saved")
    metrics = evaluate(runs.of(name, "unpacked"), saved, None)
    for key in ("loss", "reference_weights/good", "rewards/margins"):
        assert metrics[key] == pytest.approx(last[f"eval_{key}"], rel=1e-5), key
    start = evaluate(runs.of(name, "tree"), None, None)
    assert start["reference_weights/good"] == pytest.approx(1 / 3)
    assert metrics["reference_weights/good"] != pytest.approx(1 / 3, abs=0.01)


def test_evaluate_needs_weights_that_were_learned(runs):
    runs("uniform")
    saved = str(runs.folder / "uniform" / "tree" / "saved")
    config = runs.of("multi thompson", "tree")
    with pytest.raises(InputError, match="thompson: .* has no weights of this rule .* as a list"):
        evaluate(config, saved, None)


def test_the_first_step_is_checked_against_the_anchor(runs):
    """The mixture is not the policy's start, so the first loss is not ln 2; but it is known."""
    first = next(line for line in runs("uniform") if "loss" in line)
    assert first["loss"] != pytest.approx(np.log(2), abs=1e-3)
    names = {"good": "own", "own": "good", "bad": "bad"}  # the files exchanged, the anchor wrong
    swapped = [{**x, "name": names[x["name"]]} for x in runs.references]
    loss = {"references": swapped, "reference_anchor": "good"}
    assert trained(runs.config("swapped", "tree", loss))
    wrong = Path(runs.references[1]["ref_logps"])
    own = runs.folder / "wrong own"
    _shift(wrong, own, runs)
    loss = {"references": [{"name": "own", "ref_logps": str(own)}, runs.references[2]]}
    with pytest.raises(RunError, match="the loss of the anchor's log-probabilities"):
        trained(runs.config("wrong", "tree", loss))


def _shift(source: Path, target: Path, runs: Runs) -> None:
    """The same model's log-probabilities, all of them off by a nat."""
    from megatron_prefix.data.store.dataset import PreferenceDataset
    from megatron_prefix.reference.sidecars import read_sidecar, sidecar_model, write_sidecar

    model = sidecar_model(str(source))
    sets = [PreferenceDataset(runs.data), PreferenceDataset(runs.valid)]
    scores = [(data, read_sidecar(str(source), model, data) - 1) for data in sets]
    write_sidecar(str(target), model, scores)


def test_an_anchor_of_another_model_is_not_checked(runs, capsys):
    loss = {"references": [runs.references[2]], "reference_anchor": "good"}
    result = trained(runs.config("single", "tree", loss))
    assert "the anchor good is not the policy's initial model" in capsys.readouterr().out
    assert lines(runs.folder / "single" / "tree") == result


def test_an_unclear_anchor_is_refused(runs):
    loss = {"references": [runs.references[0], runs.references[2]]}
    with pytest.raises(
        InputError, match="none of them has the policy's .*set loss.reference_anchor"
    ):
        trained(runs.config("unclear", "tree", loss))
    twice = [runs.references[1], {**runs.references[1], "name": "again"}]
    with pytest.raises(
        InputError, match="own, again all have the policy's .*set loss.reference_anchor"
    ):
        trained(runs.config("unclear", "tree", {"references": twice}))


def test_another_data_set_is_refused(runs, tmp_path):
    other = write_ranked_set(tmp_path / "other", 7, 6)
    config = runs.config("data", "tree", {"references": runs.references})
    config = replace(config, data=replace(config.data, train=other))
    with pytest.raises(InputError, match="made from data sets"):
        trained(config)
