"""Whole runs of objectives that look at the whole step: two passes, in every layout the same."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranked_sets import write_ranked_set
from small_runs import assert_same_runs, configure, prepare, saved_weights, timeless, trained

from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.distributed.world import join_world
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.train import two_passes
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.pace import MEASURED
from megatron_prefix.train.scoring import score_reference

STEPS = 6
"""Of 4 of 10 groups: step 3 crosses the end of the first epoch, and has a group twice."""
BATCHES = {"global_batch_size": 4, "seed": 3}
UNPACKED = {"sharing": "none", "packing": False, "row_capacity": None}
LAYOUTS = {
    "tree": {"sharing": "tree"},
    "tree, small rows": {"sharing": "tree", "row_capacity": 200},
    "pair": {"sharing": "pair", "row_capacity": 300},
    "response": {"sharing": "response"},
    "none": {"sharing": "none", "row_capacity": 400},
    "unpacked": {**UNPACKED, "micro_batch_size": 6},
}
OBJECTIVES = {
    "aot": {"loss_type": "aot"},
    "aot_unpaired": {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    "tails": {"loss_type": ["aot", "sigmoid", "sft"], "ld_alpha": 0.25},
}
SKIPPED = (*MEASURED, "tokens/executed", "tokens/targets")
SKIPPED += ("rows/projected", "logps/pass_difference")


@pytest.fixture(scope="session")
def plain_set(tmp_path_factory) -> str:
    """PREFIX of ten conversations whose pairs all weigh 1."""
    return write_ranked_set(tmp_path_factory.mktemp("plain") / "set", 0, 10, weighted=False)


class Runs:
    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset = folder, dataset
        self.known: dict[tuple[str, str], tuple] = {}

    def configure(self, objective: str, layout: str, name: str = "", **train):
        output = self.folder / objective / (name or layout)
        return configure(
            output,
            self.dataset,
            data={"valid": self.dataset, **BATCHES, **LAYOUTS[layout]},
            loss=OBJECTIVES[objective],
            train={"steps": STEPS, "save": str(output / "saved"), **train},
        )

    def __call__(self, objective: str, layout: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        key = objective, layout
        if key not in self.known:
            config = self.configure(objective, layout)
            self.known[key] = trained(config), saved_weights(config.train.save, STEPS)
        return self.known[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, plain_set) -> Runs:
    return Runs(tmp_path_factory.mktemp("step objectives"), plain_set)


STEEP = dict.fromkeys(("loss", "grad_norm", "eval_loss"), {"rel": 1e-5})
# Made of differences of large numbers: seen to differ by 5e-5 where the losses agree to 3e-7.
WATCHED = ("kl", "logratios/mean", "logratios/chosen", "logratios/rejected")
WATCHED += ("rewards/length_correlation",)
LOOSE = dict.fromkeys([*WATCHED, *(f"eval_{key}" for key in WATCHED)], {"abs": 1e-4})


def assert_same(result: tuple, expected: tuple) -> None:
    assert_same_runs(result, expected, SKIPPED, {**STEEP, **LOOSE})


@pytest.mark.parametrize(
    ("objective", "layout"),
    [("aot", x) for x in LAYOUTS if x != "unpacked"]
    + [("aot_unpaired", "tree, small rows"), ("tails", "tree, small rows"), ("tails", "pair")],
)
def test_every_layout_follows_the_unpacked_run(runs, objective, layout):
    expected = runs(objective, "unpacked")
    first, last = expected[0][0], expected[0][-1]
    assert last["eval_loss"] < 0.98 * first["eval_loss"], "nothing was learned"
    assert_same(runs(objective, layout), expected)


def test_the_passes_agree_bit_for_bit(runs):
    rows = [row for row in runs("tails", "tree, small rows")[0] if "loss" in row]
    assert [row["logps/pass_difference"] for row in rows] == [0.0] * STEPS


def test_the_passes_agree_in_bfloat16_with_recompute(runs):
    config = runs.configure("tails", "tree, small rows", "bfloat16", save=None)
    model = {"dtype": "bfloat16", "recompute_granularity": "full", "recompute_method": "uniform"}
    config = replace(config, model=replace(config.model, **model, recompute_num_layers=1))
    rows = [row for row in trained(config) if "loss" in row]
    float32 = [row for row in runs("tails", "tree, small rows")[0] if "loss" in row]
    for row, other in zip(rows, float32, strict=True):
        assert row["logps/pass_difference"] == 0.0
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-2)


def test_two_passes_are_one(runs):
    """`sigmoid` gives the same run, bit for bit, whether a step runs in one pass or in two."""
    lines, weights = [], []
    for name in ("sigmoid", "step_records:SIGMOID"):
        config = runs.configure("aot", "tree, small rows", f"as {name[:7]}")
        loss = {"loss_type": [name, "sft"], "ld_alpha": 0.5}
        config = replace(config, loss=replace(config.loss, **loss))
        rows = trained(config)
        drop = {"logps/pass_difference", "groups_per_block", "eval_groups_per_block"}
        renamed = [
            {re.sub("_in_two_passes", "", k): x for k, x in row.items() if k not in drop}
            for row in timeless(rows)
        ]
        lines.append(renamed)
        weights.append(saved_weights(config.train.save, STEPS))
    for a, b in zip(*lines, strict=True):
        assert a == pytest.approx(b, rel=1e-12, abs=1e-15)
        assert a.get("grad_norm") == b.get("grad_norm")
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_the_mean_of_micro_batches_is_another_run(runs):
    """So the comparison of layouts can fail: sorting each row's pairs alone is another loss."""
    row_wise = trained(
        replace(
            runs.configure("aot", "tree, small rows", "by rows"),
            loss=replace(runs.configure("aot", "tree").loss, loss_type="sigmoid"),
        )
    )
    assert abs(row_wise[-1]["eval_loss"] - runs("aot", "tree")[0][-1]["eval_loss"]) > 1e-4


def test_a_table_by_group_and_not_by_slot_is_found(runs, monkeypatch):
    """Step 3 has a group twice. A table with one entry for both is another loss."""
    bundles = Sampler._bundles

    def by_group(sampler, groups, first=0):
        places = {int(group): slot for slot, group in reversed(list(enumerate(groups)))}
        return [replace(b, slot=places[b.group]) for b in bundles(sampler, groups, first)]

    right = [row for row in runs("aot", "tree")[0] if "loss" in row]
    config = runs.configure("aot", "tree", "by group", save=None)
    with join_world(config.parallel, config.train.seed) as world:
        run = prepare(config, world)
        twice = [i for i in range(STEPS) if len(np.unique(run.sampler.composition.groups(i))) < 4]
        assert twice == [2], "no step has a group twice: take another seed"
        monkeypatch.setattr(Sampler, "_bundles", by_group)
        run.step = 0
        losses = []
        try:
            losses = [run.train_step()["loss"] for _ in range(twice[0] + 1)]
        finally:
            run.close()
    assert losses[:-1] == [row["loss"] for row in right[: twice[0]]]
    assert abs(losses[-1] / right[twice[0]]["loss"] - 1) > 1e-3


def test_a_pass_that_differs_stops_the_run(runs, monkeypatch):
    scores = two_passes.score_rows

    def shifted(chunks, batches):
        rows = scores(chunks, batches)
        rows[1][2] += 3e-3
        return rows

    monkeypatch.setattr(two_passes, "score_rows", shifted)
    config = runs.configure("aot", "tree, small rows", "shifted", save=None)
    with pytest.raises(RunError, match=r"two passes .* group \d+, response \d+, differs by 3.0"):
        trained(config)


def test_scores_that_are_not_finite_name_their_responses(runs, monkeypatch):
    scores = two_passes.score_rows

    def broken(chunks, batches):
        rows = scores(chunks, batches)
        rows[1][2] = float("nan")
        return rows

    config = runs.configure("aot", "tree, small rows", "broken", save=None)
    with join_world(config.parallel, config.train.seed) as world:
        run = prepare(config, world)
        monkeypatch.setattr(two_passes, "score_rows", broken)
        group, response = run.feed.step(0).rows[1].response_ids[2]
        with pytest.raises(RunError, match=f"loss of step 1 .*: group {group} response {response}"):
            run.train_step()
        run.close()
    assert (runs.folder / "aot" / "broken" / "nonfinite-step0000001-rank0.npz").exists()


@pytest.mark.parametrize("objective", ["aot", "tails"])
def test_a_precomputed_reference_is_the_same(runs, objective, tmp_path):
    sidecar = str(tmp_path / "sidecar")
    score_reference(runs.configure(objective, "none"), sidecar)
    config = configure(
        tmp_path / "run",
        runs.dataset,
        data={"valid": runs.dataset, **BATCHES, "sharing": "tree"},
        loss={**OBJECTIVES[objective], "reference": "precomputed", "ref_logps": sidecar},
        train={"steps": STEPS, "save": str(tmp_path / "saved")},
    )
    ours = trained(config), saved_weights(tmp_path / "saved", STEPS)
    theirs = runs(objective, "tree")
    # Before the first update all rewards are 0 to rounding, and accuracies are of this rounding.
    assert_same((ours[0][2:], ours[1]), (theirs[0][2:], theirs[1]))


def test_evaluate_equals_the_evaluation_of_the_run(runs):
    last = runs("aot", "tree")[0][-1]
    assert last["eval_groups_per_block"] == 4
    config = runs.configure("aot", "tree")
    result = evaluate(config, config.train.save, None)
    assert {f"eval_{key}": x for key, x in result.items()} == pytest.approx(
        {key: x for key, x in last.items() if key != "step"}, rel=1e-6, abs=1e-9
    )


def test_evaluation_in_blocks_is_not_that_of_all_pairs_at_once(runs, tmp_path):
    config = runs.configure("aot", "tree")
    data = replace(config.data, global_batch_size=10)
    whole = evaluate(replace(config, data=data), config.train.save, None)
    last = runs("aot", "tree")[0][-1]
    assert whole["groups_per_block"] == 10
    assert abs(whole["loss"] / last["eval_loss"] - 1) > 1e-5
    assert whole["rewards/margins"] == pytest.approx(last["eval_rewards/margins"], rel=1e-6)


def test_weights_of_pairs_are_refused(tmp_path):
    dataset = write_ranked_set(tmp_path / "weighted", 0, 6)
    config = configure(tmp_path / "run", dataset, loss={"loss_type": "aot"})
    with pytest.raises(InputError, match="another weight than 1 .* aot sorts the pairs of a step"):
        trained(config)
    plain = write_ranked_set(tmp_path / "plain", 0, 6, weighted=False)
    config = configure(
        tmp_path / "run", plain, loss={"loss_type": "aot_unpaired", "weighting": "group"}
    )
    with pytest.raises(InputError, match="under loss.weighting: group .* set loss.weighting: pair"):
        trained(config)
