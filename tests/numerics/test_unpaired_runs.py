"""Whole runs of objectives over labelled responses: how these lie in rows changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_sets import write_labelled_set
from ranked_sets import write_ranked_set
from small_runs import (
    assert_same_runs,
    configure,
    lines,
    saved_state,
    saved_weights,
    timeless,
    trained,
)

from megatron_prefix.errors import InputError
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.pace import MEASURED
from megatron_prefix.train.scoring import score_reference
from megatron_prefix.train.trainer import Trainer

STEPS = 6
BATCHES = {"global_batch_size": 4, "seed": 3}
UNPACKED = {"sharing": "none", "packing": False, "row_capacity": None, "micro_batch_size": 4}
LAYOUTS = {
    "tree": {"sharing": "tree"},
    "tree, small rows": {"sharing": "tree", "row_capacity": 80},
    "tree, in parts": {"sharing": "tree", "row_capacity": 36, "oversized": "split"},
    "response": {"sharing": "response", "row_capacity": 120},
    "none": {"sharing": "none", "row_capacity": 120},
    "unpacked": UNPACKED,
}
OBJECTIVES = {
    "bco": {"loss_type": "bco"},
    "kto": {"loss_type": "kto", "undesirable_weight": 0.8},
    "apo": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5},
}
SKIPPED = (*MEASURED, "tokens/executed", "tokens/targets")
SKIPPED += ("rows/projected", "logps/pass_difference")


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[str, str, str], tuple] = {}
        self.data = {
            name: write_labelled_set(folder / name, 0, 10, paired=name == "pairs", mismatches=True)
            for name in ("labels", "pairs")
        }

    def configure(self, objective: str, layout: str, data: str = "labels", name: str = "", **more):
        output = self.folder / objective / data / (name or layout)
        loss = {**OBJECTIVES[objective], **more.pop("loss", {})}
        return configure(
            output,
            self.data[data],
            data={"valid": self.data[data], **BATCHES, **LAYOUTS[layout]},
            loss=loss,
            train={"steps": STEPS, "save": str(output / "saved"), **more},
        )

    def __call__(self, objective: str, layout: str, data: str = "labels") -> tuple:
        key = objective, layout, data
        if key not in self.known:
            config = self.configure(*key)
            self.known[key] = trained(config), saved_weights(config.train.save, STEPS)
        return self.known[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("labels"))


STEEP = dict.fromkeys(("loss", "grad_norm", "eval_loss", "delta"), {"rel": 1e-5, "abs": 1e-7})
# Made of differences of large numbers: seen to differ by 5e-5 where the losses agree to 3e-7.
WATCHED = ("kl", "logratios/mean", "logratios/chosen", "logratios/rejected")
WATCHED += ("rewards/length_correlation",)
LOOSE = dict.fromkeys([*WATCHED, *(f"eval_{key}" for key in WATCHED)], {"abs": 1e-4})


def assert_same(result: tuple, expected: tuple) -> None:
    assert_same_runs(result, expected, SKIPPED, {**STEEP, **LOOSE})


@pytest.mark.parametrize("data", ["labels", "pairs"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_layout_follows_the_unpacked_run(runs, objective, data):
    expected = runs(objective, "unpacked", data)
    first, last = expected[0][0], expected[0][-1]
    assert last["eval_loss"] < 0.98 * first["eval_loss"], "nothing was learned"
    for layout in ("tree", "tree, small rows", "response", "none"):
        if data == "labels" or layout in ("tree, small rows", "none"):
            assert_same(runs(objective, layout, data), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trees_in_parts_follow_the_unpacked_run(runs, objective):
    """A step with such trees has two passes, which the others do not log."""
    result, expected = runs(objective, "tree, in parts"), runs(objective, "unpacked")
    assert max(row["tokens/repeated"] for row in result[0] if "loss" in row) > 0
    skipped, close = (*SKIPPED, "tokens/repeated"), {**STEEP, **LOOSE}
    assert_same_runs(result, expected, skipped, close, has_same_keys=False)


def test_objectives_differ(runs):
    losses = {name: runs(name, "tree")[0][-1]["eval_rewards/margins"] for name in OBJECTIVES}
    assert len({round(x, 4) for x in losses.values()}) == len(OBJECTIVES), losses


def test_pairs_cannot_be_laid_out(runs):
    with pytest.raises(InputError, match="data.sharing = pair: .* use tree, response or none"):
        LAYOUTS["pair"] = {"sharing": "pair"}
        trained(runs.configure("bco", "pair"))


def test_metrics(runs):
    rows = [row for row in runs("bco", "tree")[0] if "loss" in row]
    assert [row["logps/pass_difference"] for row in rows] == [0.0] * STEPS
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    counts = [row["count/desirable"] + row["count/undesirable"] for row in rows]
    assert all(isinstance(x, float) and x == int(x) > 0 for x in counts)
    pairs = runs("bco", "tree", "pairs")[0][-1]
    assert 0.5 < pairs["eval_rewards/accuracies"] <= 1
    assert pairs["eval_count/desirable"] == pairs["eval_num_pairs"]


def deltas(rows: list[dict]) -> list[float]:
    return [row["delta"] for row in rows if "loss" in row]


def test_a_resumed_run_continues_the_running_mean(runs, monkeypatch):
    whole, _ = runs("bco", "tree")
    config = runs.configure("bco", "tree", name="cut", steps=3)
    trained(config)
    _, common = saved_state(config.train.save, 3)
    total, count = common["objective_state"]["running_rewards"]
    assert total / count == deltas(whole)[2]

    def resumed(name: str) -> list[dict]:
        output = runs.folder / "bco" / "labels" / name
        shutil.copytree(runs.folder / "bco" / "labels" / "cut", output)
        saved = str(output / "saved")
        again = runs.configure("bco", "tree", name=name, steps=STEPS, load=saved)
        trained(again)
        return lines(output)

    assert deltas(resumed("resumed")) == deltas(whole)
    init = Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, **keys: init(self, **{**keys, "running_rewards": (0, 0)})
    )
    forgotten = deltas(resumed("forgotten"))
    assert forgotten[:3] == deltas(whole)[:3]
    assert abs(forgotten[3] - deltas(whole)[3]) > 1e-3


def test_a_resumed_run_of_kto_is_the_same(runs):
    """To the bit: what it knows of mismatches is in the plan."""
    whole, weights = runs("kto", "tree")
    config = runs.configure("kto", "tree", name="cut", steps=3)
    trained(config)
    saved = config.train.save
    again = runs.configure("kto", "tree", name="cut", load=saved)
    steps, expected = ([x for x in timeless(y) if "loss" in x] for y in (trained(again), whole))
    assert steps == expected and max(row["kl"] for row in steps) > 0
    resumed = saved_weights(saved, STEPS)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_evaluate_uses_the_running_mean_of_the_checkpoint(runs):
    last = runs("bco", "tree")[0][-1]
    assert last["eval_delta"] == pytest.approx(deltas(runs("bco", "tree")[0])[-1])
    config = runs.configure("bco", "tree")
    result = evaluate(config, config.train.save, None)
    assert {f"eval_{key}": x for key, x in result.items()} == pytest.approx(
        {key: x for key, x in last.items() if key != "step"}, rel=1e-6, abs=1e-9
    )
    assert evaluate(config, None, None)["delta"] == 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_precomputed_reference_is_the_same(runs, objective, tmp_path):
    sidecar = str(tmp_path / "sidecar")
    score_reference(runs.configure(objective, "none"), sidecar)
    loss = {"reference": "precomputed", "ref_logps": sidecar}
    config = runs.configure(objective, "tree", name="precomputed", loss=loss)
    ours = trained(config), saved_weights(config.train.save, STEPS)
    theirs = runs(objective, "tree")
    assert_same((ours[0][2:], ours[1]), (theirs[0][2:], theirs[1]))


def test_responses_without_a_clear_label_are_refused(runs, tmp_path):
    ranked = write_ranked_set(tmp_path / "ranked", 0, 6)
    config = configure(tmp_path / "run", ranked, loss={"loss_type": "bco"})
    with pytest.raises(InputError, match="are chosen in one pair and rejected in another .*first"):
        trained(config)
    scored = write_ranked_set(tmp_path / "scored", 0, 6, pairs=False)
    config = configure(tmp_path / "run", scored, loss={"loss_type": "apo_zero_unpaired"})
    with pytest.raises(InputError, match="have no pair and another score than 1 or 0"):
        trained(config)


def test_kto_needs_mismatches(tmp_path):
    plain = write_labelled_set(tmp_path / "plain", 0, 6)
    kto = write_labelled_set(tmp_path / "kto", 0, 6, mismatches=True)
    for data in ({"train": plain}, {"train": kto, "valid": plain}):
        config = configure(tmp_path / "run", kto, data=data, loss={"loss_type": "kto"})
        setting = "data.valid" if "valid" in data else "data.train"
        with pytest.raises(InputError, match=f"{setting} = .* has none: build it again .* --kto"):
            trained(config)
