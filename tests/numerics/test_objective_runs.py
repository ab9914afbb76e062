"""Whole runs of objectives of every unit: how responses lie in rows changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranked_sets import write_ranked_set
from small_runs import assert_same_runs, configure, lines, prepare, saved_weights, trained

from megatron_prefix.distributed.world import join_world
from megatron_prefix.errors import InputError
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.pace import MEASURED
from megatron_prefix.train.scoring import score_reference

STEPS = 6
UNPACKED = {"sharing": "none", "packing": False, "row_capacity": None}
LAYOUTS = {
    "tree": {"sharing": "tree"},
    "tree, small rows": {"sharing": "tree", "row_capacity": 200},
    "pair": {"sharing": "pair"},
    "response": {"sharing": "response"},
    "none": {"sharing": "none"},
    "unpacked": {**UNPACKED, "micro_batch_size": 6},
}
REWARD = {"kind": "reward", "init_method_std": 0.05}
OBJECTIVES = {  # name: loss section, model section
    "list": ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {}),
    "orpo": ({"loss_type": "orpo", "weighting": "group"}, {}),
    "simpo": ({"loss_type": "simpo", "beta": 2.0}, {}),
    "aware": ({"loss_type": "rpo_bwd_kl", "reward_scale": 3.0}, {}),
    "adjacent": ({"loss_type": "hinge", "comparisons": "adjacent"}, {}),
    "no reference": ({"reference": "none", "beta": 0.5}, {}),
    "margins": ({"margin": True, "comparisons": "best_vs_rest", "dpop_lambda": 5.0}, {}),
    "tails": (
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.25, "comparisons": "best_vs_rest"},
        {},
    ),
    "on policy": ({"loss_type": "sigmoid", "use_weighting": True}, {"lm_head_chunk_size": 64}),
    "plackett_luce": ({"loss_type": "plackett_luce"}, {}),
    "lists of sets": ({"loss_type": ["nca", "infonca"], "temperature": 0.5}, {}),
    "lipo": ({"loss_type": "lipo_lambda"}, {}),
    "scaled": ({"loss_type": "scaled_bradley_terry", "comparisons": "best_vs_worst"}, REWARD),
    "ranked rewards": ({"loss_type": "plackett_luce"}, REWARD),
    "regression": ({"loss_type": "regression"}, REWARD),
}
OF_SETS = ("plackett_luce", "lists of sets", "lipo", "ranked rewards", "regression")
RELATIVE = 1e-5
SKIPPED = (*MEASURED, "tokens/executed", "tokens/targets")


@pytest.fixture(scope="session")
def ranked_set(tmp_path_factory) -> str:
    """PREFIX of ten conversations."""
    return write_ranked_set(tmp_path_factory.mktemp("ranked") / "set", 0, 10)


class Runs:
    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset = folder, dataset
        self.known: dict[tuple[str, str], tuple] = {}

    def configure(self, objective: str, layout: str, **train):
        loss, model = OBJECTIVES[objective]
        output = self.folder / objective / layout
        return configure(
            output,
            self.dataset,
            data={"valid": self.dataset, "global_batch_size": 4, **LAYOUTS[layout]},
            model=model,
            loss=loss,
            train={"steps": STEPS, "save": str(output / "saved"), **train},
        )

    def __call__(self, objective: str, layout: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        key = objective, layout
        if key not in self.known:
            config = self.configure(objective, layout)
            self.known[key] = trained(config), saved_weights(config.train.save, STEPS)
        return self.known[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ranked_set) -> Runs:
    return Runs(tmp_path_factory.mktemp("objectives"), ranked_set)


STEEP = dict.fromkeys(("loss", "grad_norm", "eval_loss"), {"rel": RELATIVE})


def assert_same(result: tuple, expected: tuple) -> None:
    assert_same_runs(result, expected, (*SKIPPED, "rows/projected"), STEEP)


OTHERS = [name for name in LAYOUTS if name != "unpacked"]
IN_ALL = ("list", "tails", "plackett_luce", "regression")
"""One objective of each unit; `list` has pairs and tokens, `tails` parts of responses."""


@pytest.mark.parametrize(
    ("objective", "layout"),
    [(x, "tree") for x in OBJECTIVES] + [(x, y) for x in IN_ALL for y in OTHERS[1:]],
)
def test_every_layout_follows_the_unpacked_run(runs, objective, layout):
    if layout == "pair" and objective in OF_SETS:
        with pytest.raises(InputError, match="data.sharing = pair: .* use tree, response or none"):
            trained(runs.configure(objective, layout))
        return
    expected = runs(objective, "unpacked")
    first, last = expected[0][0], expected[0][-1]
    assert last["eval_loss"] < 0.98 * first["eval_loss"], "nothing was learned"
    assert_same(runs(objective, layout), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_differ(runs, objective):
    """So the comparison can fail: no two of them follow one trajectory."""
    ours = runs(objective, "tree")[0]
    for other in OBJECTIVES:
        if other != objective:
            theirs = runs(other, "tree")[0]
            assert abs(ours[-1]["eval_loss"] - theirs[-1]["eval_loss"]) > 1e-4


def test_a_set_stays_in_one_micro_batch(runs):
    config = runs.configure("plackett_luce", "unpacked")
    small = configure(
        runs.folder / "small",
        runs.dataset,
        data={**UNPACKED, "micro_batch_size": 2},
        loss=config.loss.__dict__ | {"reference": None},
    )
    with pytest.raises(InputError, match="is 5 sequences under data.sharing: response"):
        trained(small)


def test_a_wrong_denominator_is_found(runs, monkeypatch):
    """A mean over the row's own sets instead of the step's makes another trajectory."""
    from megatron_prefix.engine.batch import TrainBatch

    whole = TrainBatch.loss_inputs
    config = runs.configure("plackett_luce", "tree, small rows", save=None)

    def of_row(batch, scores):
        object.__setattr__(batch, "denominators", None)
        return whole(batch, scores)

    monkeypatch.setattr(TrainBatch, "loss_inputs", of_row)
    with join_world(config.parallel, config.train.seed) as world:
        run = prepare(config, world)
        values = run.train_step()
        run.close()
    expected = runs("plackett_luce", "tree, small rows")[0][1]
    assert abs(values["loss"] / expected["loss"] - 1) > 0.1


def test_metrics_of_lists_and_sets(runs):
    list_run = [row for row in runs("list", "tree")[0] if "loss" in row]
    for row in list_run:
        parts = [row[f"loss/{name}"] for name in ("sigmoid", "bco_pair", "sft")]
        total = 0.8 * parts[0] + 0.2 * parts[1] + parts[2]
        assert row["loss"] == pytest.approx(total, rel=1e-9) and row["nll_loss"] == parts[2]
    last = runs("plackett_luce", "tree")[0][-1]
    assert 0.5 < last["eval_rewards/top1"] <= 1
    rewards = runs("regression", "tree")[0][-2]
    assert rewards["rewards/min"] < rewards["rewards/mean"] < rewards["rewards/max"]
    assert rewards["mse"] == pytest.approx(rewards["loss"], rel=1e-9)


@pytest.mark.parametrize("objective", ["simpo", "orpo", "no reference"])
def test_runs_without_a_reference_load_none(runs, objective):
    config = runs.configure(objective, "tree", save=None)
    with join_world(config.parallel, config.train.seed) as world:
        run = prepare(config, world)
        assert not hasattr(run.reference, "chunks")
        assert run.identity["reference model fingerprint"] is None
        run.close()
    with pytest.raises(InputError, match="has no reference"):
        score_reference(runs.configure(objective, "tree"), str(runs.folder / "sidecar"))


@pytest.mark.parametrize("objective", ["list", "plackett_luce", "aware", "tails"])
def test_a_precomputed_reference_is_the_same(runs, objective, tmp_path):
    sidecar = str(tmp_path / "sidecar")
    score_reference(runs.configure(objective, "none"), sidecar)
    loss, model = OBJECTIVES[objective]
    config = configure(
        tmp_path / "run",
        runs.dataset,
        data={"valid": runs.dataset, "global_batch_size": 4, "sharing": "tree"},
        loss={**loss, "reference": "precomputed", "ref_logps": sidecar},
        train={"steps": STEPS, "save": str(tmp_path / "saved")},
    )
    ours = trained(config), saved_weights(tmp_path / "saved", STEPS)
    theirs = runs(objective, "tree")
    # Before the first update all rewards are 0 to rounding, and accuracies are of this rounding.
    assert_same((ours[0][2:], ours[1]), (theirs[0][2:], theirs[1]))


@pytest.mark.parametrize("objective", ["list", "plackett_luce", "regression", "tails", "on policy"])
def test_evaluate_equals_the_evaluation_of_the_run(runs, objective):
    last = runs(objective, "tree")[0][-1]
    config = runs.configure(objective, "tree")
    result = evaluate(config, config.train.save, None)
    assert {f"eval_{key}": x for key, x in result.items()} == pytest.approx(
        {key: x for key, x in last.items() if key != "step"}, rel=1e-6, abs=1e-9
    )


def test_regression_needs_no_pairs(tmp_path):
    dataset = write_ranked_set(tmp_path / "alone", 0, 8, pairs=False)
    result = []
    for name, layout in (("tree", {}), ("none", {"sharing": "none"})):
        config = configure(
            tmp_path / name,
            dataset,
            data={"valid": dataset, **layout},
            model=REWARD,
            loss={"loss_type": "regression"},
            train={"steps": STEPS, "save": str(tmp_path / name / "saved")},
        )
        result.append((trained(config), saved_weights(config.train.save, STEPS)))
    assert_same(*result)
    rows = lines(tmp_path / "tree")
    assert rows[-1]["eval_mse"] < 0.5 * rows[0]["eval_mse"] and rows[1]["num_pairs"] == 0
    assert "rewards/accuracies" not in rows[1]
    with pytest.raises(InputError, match="no pair .* the loss compares pairs"):
        trained(configure(tmp_path / "other", dataset, model=REWARD))


def test_tails_need_a_file_that_was_made_for_them(runs, tmp_path):
    sidecar = str(tmp_path / "sidecar")
    score_reference(runs.configure("list", "tree"), sidecar)
    loss = {"ld_alpha": 0.5, "reference": "precomputed", "ref_logps": sidecar}
    config = configure(tmp_path / "run", runs.dataset, loss=loss, train={"steps": 1})
    with pytest.raises(InputError, match="made without loss.ld_alpha, .*: score again with"):
        trained(config)
