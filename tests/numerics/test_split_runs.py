"""Whole runs with `data.oversized: split`: trees, pairs and sets in parts change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranked_sets import write_ranked_set
from small_runs import assert_same_runs, configure, prepare, saved_weights, timeless, trained

from megatron_prefix.__main__ import main
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.distributed.world import join_world
from megatron_prefix.engine.batch import to_device
from megatron_prefix.engine.step import preference_loss
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.train.evaluation import evaluate
from megatron_prefix.train.pace import MEASURED
from megatron_prefix.train.scoring import score_reference

STEPS = 6
BATCHES = {"global_batch_size": 4, "seed": 3}
"""Of 10 groups: step 3 crosses the end of the first epoch, and has a group twice."""
SPLIT = {"oversized": "split", "row_capacity": 38}
UNPACKED = {"packing": False, "oversized": "split"}
LAYOUTS = {
    "tree": {**SPLIT, "sharing": "tree"},
    "pair": {**SPLIT, "sharing": "pair"},
    "response": {**SPLIT, "sharing": "response"},
    "none": {**SPLIT, "sharing": "none"},
    "unpacked trees": {**SPLIT, **UNPACKED, "sharing": "tree", "micro_batch_size": 2},
    "unpacked": {**UNPACKED, "sharing": "none", "micro_batch_size": 1},
}
REWARD = {"kind": "reward", "init_method_std": 0.05}
OBJECTIVES = {  # name: loss section, model section
    "sigmoid": ({"loss_type": "sigmoid"}, {}),
    "list": ({"loss_type": ["hinge", "sft"], "weighting": "group"}, {}),
    "on policy": ({"loss_type": "ipo", "use_weighting": True, "comparisons": "adjacent"}, {}),
    "plackett_luce": ({"loss_type": "plackett_luce"}, {}),
    "bradley_terry": ({"loss_type": "bradley_terry", "margin": True}, REWARD),
    "regression": ({"loss_type": "regression"}, REWARD),
}
SKIPPED = (*MEASURED, "tokens/executed", "tokens/targets")
SKIPPED += ("rows/projected", "logps/pass_difference", "tokens/repeated")


@pytest.fixture(scope="session")
def ranked_set(tmp_path_factory) -> str:
    """PREFIX of ten conversations; the longest path takes 35 tokens."""
    return write_ranked_set(tmp_path_factory.mktemp("ranked") / "set", 0, 10)


class Runs:
    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset = folder, dataset
        self.known: dict[tuple[str, str], tuple] = {}

    def configure(self, objective: str, layout: str | None, name: str = "", **train):
        loss, model = OBJECTIVES[objective]
        output = self.folder / objective / (name or layout or "whole")
        return configure(
            output,
            self.dataset,
            data={"valid": self.dataset, **BATCHES, **(LAYOUTS[layout] if layout else {})},
            model=model,
            loss=loss,
            train={"steps": STEPS, "save": str(output / "saved"), **train},
        )

    def __call__(self, objective: str, layout: str | None = None) -> tuple[list[dict], dict]:
        key = objective, layout or ""
        if key not in self.known:
            config = self.configure(objective, layout)
            self.known[key] = trained(config), saved_weights(config.train.save, STEPS)
        return self.known[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ranked_set) -> Runs:
    return Runs(tmp_path_factory.mktemp("split"), ranked_set)


STEEP = dict.fromkeys(("loss", "grad_norm", "eval_loss"), {"rel": 1e-5})


def assert_same(result: tuple, expected: tuple) -> None:
    assert_same_runs(result, expected, SKIPPED, STEEP, has_same_keys=False)


ALSO = [("list", "tree"), ("on policy", "tree"), ("sigmoid", "none")]
ALSO += [("sigmoid", "unpacked"), ("plackett_luce", "unpacked")]
CASES = [(x, "tree") for x in ("sigmoid", "plackett_luce", "bradley_terry", "regression")]
CASES += [("sigmoid", x) for x in ("pair", "unpacked trees")] + [("plackett_luce", "response")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in ALSO]


@pytest.mark.parametrize(("objective", "layout"), CASES)
def test_split_follows_the_run_of_whole_trees(runs, objective, layout):
    expected = runs(objective)
    assert expected[0][-1]["eval_loss"] < 0.98 * expected[0][0]["eval_loss"], "nothing was learned"
    result = runs(objective, layout)
    assert_same(result, expected)
    steps = [row for row in result[0] if "loss" in row]
    assert sum("logps/pass_difference" in row for row in steps) >= 4, "hardly a step has parts"
    if layout == "tree":
        repeated = [row["tokens/repeated"] for row in steps]
        whole = [row["tokens/executed"] for row in expected[0] if "loss" in row]
        assert repeated == [x["tokens/executed"] - n for x, n in zip(steps, whole, strict=True)]
        assert max(repeated) > 20


def test_steps_without_parts_run_in_one_pass(runs, tmp_path):
    """Of the sizes of the groups only some exceed this capacity."""
    config = runs.configure("sigmoid", "tree", "large rows")
    capacity = int(np.median(np.sort(prepared_lengths(config))[-3:]))
    rows = trained(replace(config, data=replace(config.data, row_capacity=capacity)))
    assert_same((rows, saved_weights(config.train.save, STEPS)), runs("sigmoid"))
    two = ["logps/pass_difference" in row for row in rows if "loss" in row]
    assert 0 < sum(two) < STEPS
    assert [row["tokens/repeated"] > 0 for row in rows if "loss" in row] == two


def prepared_lengths(config) -> np.ndarray:
    from megatron_prefix.data.store.dataset import PreferenceDataset

    return PreferenceDataset(config.data.train).groups_num_tokens()


def test_without_the_table_the_run_is_another(runs, monkeypatch):
    """So the comparison can fail: each row alone lacks the pairs that lie in two."""
    step = Sampler.step
    monkeypatch.setattr(Sampler, "step", lambda *args: replace(step(*args), is_divided=False))
    rows = trained(runs.configure("sigmoid", "tree", "no table", save=None))
    assert abs(rows[1]["loss"] / runs("sigmoid")[0][1]["loss"] - 1) > 0.01


def test_a_row_of_such_a_step_has_no_loss_alone(runs):
    config = runs.configure("sigmoid", "tree", "own loop", save=None)
    with join_world(config.parallel, config.train.seed) as world:
        run = prepare(config, world)
        plan = run.sampler.step(0)
        (row, *_) = run.sampler.micro_batches(plan)
        run.close()
    batch = to_device(row, torch.device("cpu"), plan.denominators)
    logps = torch.zeros(len(row.target_token))
    with pytest.raises(ValueError, match=r"split: .* use Trainer, which runs such a step in two"):
        preference_loss(logps, batch=batch, objective=check(config.loss))


@pytest.mark.parametrize("objective", ["sigmoid", "plackett_luce"])
def test_a_precomputed_reference_is_the_same(runs, objective, tmp_path):
    """Scored whole or in parts."""
    files = [str(tmp_path / name) for name in ("whole", "parts")]
    score_reference(runs.configure(objective, None), files[0])
    score_reference(runs.configure(objective, "tree"), files[1])
    theirs = runs(objective)
    for file in files:
        config = runs.configure(objective, "tree", f"scored {Path(file).name}")
        loss = replace(config.loss, reference="precomputed", ref_logps=file)
        ours = trained(replace(config, loss=loss)), saved_weights(config.train.save, STEPS)
        # Before the first update rewards are 0 to rounding, and accuracies are of this rounding.
        assert_same((ours[0][2:], ours[1]), (theirs[0][2:], theirs[1]))


def test_evaluate_equals_the_evaluation_of_the_run(runs):
    config = runs.configure("plackett_luce", "tree")
    last = runs("plackett_luce", "tree")[0][-1]
    result = evaluate(config, config.train.save, None)
    assert {f"eval_{key}": x for key, x in result.items()} == pytest.approx(
        {key: x for key, x in last.items() if key != "step"}, rel=1e-6, abs=1e-9
    )


def test_a_resumed_run_goes_on_the_same(runs):
    saved = str(runs.folder / "resumed")
    for steps in (3, STEPS):
        config = runs.configure("sigmoid", "tree", "resumed", steps=steps, save=saved, load=saved)
        config = replace(config, data=replace(config.data, valid=None))
        rows = trained(config)
    expected = [row for row in runs("sigmoid", "tree")[0] if "loss" in row]
    assert timeless(rows) == timeless(expected)


@pytest.mark.parametrize("size", [{"global_batch_size": 4}, {"rows_per_step": 12}])
def test_a_plan_on_disk_is_the_same_run(runs, tmp_path, capsys, size):
    own = {"global_batch_size": None, "rows_per_step": None, **size}
    config = runs.configure("sigmoid", "tree", f"plan {[*size]}", save=None)
    config = replace(config, data=replace(config.data, **own, valid=None))
    alone = trained(config)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in size.items()]
    flags += ["--row-capacity=38", "--epochs=3", "--seed=3", "--oversized=split"]
    plan = str(tmp_path / "plan")
    assert main(["pack", runs.dataset, "--output", plan, *flags]) == 0
    assert "tokens repeated by data.oversized: split" in capsys.readouterr().out
    assert main(["inspect", plan, "--verify", "--data", runs.dataset]) == 0
    with_plan = replace(config, data=replace(config.data, plan=plan))
    assert timeless(trained(with_plan)) == timeless(alone)
    with pytest.raises(InputError, match=r"data.oversized is error and was split when packed"):
        trained(replace(with_plan, data=replace(with_plan.data, oversized="error")))


def test_steps_of_rows_are_those_of_whole_trees(runs):
    """The same composition, its groups in parts or whole."""
    config = runs.configure("sigmoid", "tree", "rows", save=None)
    config = replace(
        config, data=replace(config.data, valid=None, global_batch_size=None, rows_per_step=12)
    )
    losses = []
    for change in ({}, {"row_capacity": 8192, "oversized": "error"}):
        with join_world(config.parallel, config.train.seed) as world:
            run = prepare(config, world)
            run.sampler = replace(run.sampler, **change)
            assert run.sampler.step(0).is_divided == (not change)
            values = [run.train_step() for _ in range(4)]
            run.close()
        losses.append([(x["loss"], x["grad_norm"]) for x in values])
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-5)


def test_a_mixture_of_sets_is_the_same(runs, tmp_path):
    other = write_ranked_set(tmp_path / "other", 5, 6)
    lines = []
    for split in ({}, {**SPLIT, "row_capacity": 48}):
        sets = [{"prefix": runs.dataset, "weight": 2}, {"prefix": other, "weight": 1}]
        config = configure(
            tmp_path / ("split" if split else "whole"),
            runs.dataset,
            data={**BATCHES, "train": sets, **split},
            loss={"loss_type": "plackett_luce"},
            train={"steps": 3, "save": str(tmp_path / ("a" if split else "b"))},
        )
        lines.append((trained(config), saved_weights(config.train.save, 3)))
    assert_same(lines[1], lines[0])


def test_an_objective_of_the_whole_step(tmp_path):
    plain = write_ranked_set(tmp_path / "plain", 0, 10, weighted=False)
    lines = []
    for name, split in (("whole", {}), ("split", SPLIT)):
        config = configure(
            tmp_path / name,
            plain,
            data={**BATCHES, **split},
            loss={"loss_type": ["aot", "sft"]},
            train={"steps": 4, "save": str(tmp_path / name / "saved")},
        )
        lines.append((trained(config), saved_weights(config.train.save, 4)))
    assert_same(lines[1], lines[0])


def test_tails_are_refused_if_a_pair_is_cut(runs):
    config = runs.configure("sigmoid", "tree", "tails", save=None)
    tails = replace(config, loss=replace(config.loss, ld_alpha=0.5))
    with pytest.raises(InputError, match=r"ld_alpha = 0.5 with data.oversized: split: both sides"):
        trained(tails)
    trained(replace(tails, data=replace(config.data, row_capacity=8192)))


def test_split_that_has_no_effect_is_refused():
    with pytest.raises(InputError, match=r"oversized = split has no effect .*: set data.row_cap"):
        configure(Path("x"), "set", data={**UNPACKED, "micro_batch_size": 2, "row_capacity": None})
