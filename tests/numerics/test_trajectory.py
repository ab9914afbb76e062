"""Whole runs: packing and sharing do not change the optimisation.

Twenty steps in float32 at a learning rate of 1e-3 on HH-RLHF pairs, ten on OpenAssistant trees
(twenty in the slow test), the same groups in the same steps: every way to lay them out has to
follow one trajectory.

One case is avoided, because it is only rounding. A response that is chosen as often as it is
rejected has a gradient of exactly 0 at the first step, when all pairs weigh the same. If it is run
once (`tree`, `response`), it gets this 0. If it is run once per pair, it gets the rounding error of
x - x. For the embedding of a token that occurs in such responses only, this is the whole gradient,
and Adam divides it by itself. `settled_seed` finds an order of the data without such tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure, lines, prepare, saved_weights, trained

from megatron_prefix.config import Config
from megatron_prefix.data.build.builder import BuildOptions, build_dataset
from megatron_prefix.data.steps.compositions.batches import GroupBatches
from megatron_prefix.data.steps.compositions.row_batches import RowBatches
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.distributed.world import join_world

STEPS, FEW_STEPS = 20, 10
PACKED = {"row_capacity": 32768}
LAYOUTS = {
    "tree": {"sharing": "tree", **PACKED},
    "tree, small rows": {"sharing": "tree", "row_capacity": 4096},
    "pair": {"sharing": "pair", **PACKED},
    "response": {"sharing": "response", **PACKED},
    "none": {"sharing": "none", **PACKED},
    "unpacked": {
        "sharing": "none",
        "packing": False,
        "micro_batch_size": 2,
        "row_capacity": None,
    },
}
RELATIVE = {"loss": 1e-5, "grad_norm": 1e-5}
MARGIN_FLOOR = 1e-2
SAME = ("step", "num_pairs", "learning_rate", "tokens/logical")


def assert_same_metrics(metrics: list[dict], expected: list[dict]) -> None:
    """Every step, within the tolerances of docs/design.md."""
    assert [row["step"] for row in metrics] == [row["step"] for row in expected]
    for a, b in zip(metrics, expected, strict=True):
        assert all(a[key] == b[key] for key in SAME), (a, b)
        errors = {key: abs(a[key] - b[key]) / abs(b[key]) / r for key, r in RELATIVE.items()}
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            errors[key] = abs(a[key] - b[key]) / max(abs(b[key]), MARGIN_FLOOR) / 1e-3
        for key in ("logps/chosen", "logps/rejected"):
            errors[key] = abs(a[key] - b[key]) / max(abs(b[key]), 1.0) / 1e-4
        worst = max(errors, key=errors.get)
        assert errors[worst] <= 1, f"step {a['step']}: {worst} is {a[worst]}, was {b[worst]}"


def assert_same_weights(weights: dict, expected: dict) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().max() <= 1e-4, name


def assert_it_learns(rows: list[dict]) -> None:
    """An equality of runs that go nowhere would say nothing."""
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-5
    assert min(row["loss"] for row in rows) < 0.4
    assert max(row["rewards/margins"] for row in rows) > 1.0


def assert_same_trajectory(trajectory: tuple, expected: tuple) -> None:
    assert_same_metrics(trajectory[0], expected[0])
    assert_same_weights(trajectory[1], expected[1])


def undecided_tokens(dataset: PreferenceDataset, groups: np.ndarray) -> set[int]:
    """Tokens on no path of a response that is chosen more or less often than rejected."""
    decided, undecided = set(), set()
    for tree in (dataset[int(group)] for group in groups):
        balance = np.bincount(tree.pairs[:, 0], minlength=tree.num_responses)
        balance = balance - np.bincount(tree.pairs[:, 1], minlength=tree.num_responses)
        for response in range(tree.num_responses):
            tokens, _ = tree.response_tokens(response)
            (decided if balance[response] else undecided).update(tokens.tolist())
    return undecided - decided


def settled_seed(prefix: str, batch_size: int) -> int:
    """The first `data.seed` whose first step has no undecided tokens."""
    dataset = PreferenceDataset(prefix)
    for seed in range(100):
        batches = GroupBatches(len(dataset), batch_size, dataset.fingerprint, seed)
        if not undecided_tokens(dataset, batches.groups(0)):
            return seed
    raise AssertionError("no order of the data begins with decided tokens only")


class Runs:
    """Runs of one data set, each trained once: `runs(name, layout, **sections)`."""

    def __init__(self, folder: Path, dataset: str, steps: int = STEPS) -> None:
        self.folder, self.dataset, self.steps = folder, dataset, steps
        self.data = {"global_batch_size": 4, "seed": settled_seed(dataset, 4)}
        self.known: dict[str, tuple[list[dict], dict[str, torch.Tensor]]] = {}

    def configure(self, name: str, layout: dict, steps: int, **sections) -> Config:
        output = self.folder / name
        return configure(
            output,
            self.dataset,
            data={**self.data, **layout},
            train={"steps": steps, "save": str(output / "checkpoints")},
            **sections,
        )

    def __call__(self, name: str, layout: dict, steps: int | None = None, **sections) -> tuple:
        """(metrics lines, final weights) of the run, which is trained at the first call."""
        steps = steps or self.steps
        if name not in self.known:
            config = self.configure(name, layout, steps, **sections)
            self.known[name] = trained(config), saved_weights(config.train.save, steps)
        return self.known[name]


@pytest.fixture(scope="module")
def hh_runs(few_hh, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("hh"), few_hh)


@pytest.fixture(scope="module")
def oasst_runs(few_oasst, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("oasst"), few_oasst, FEW_STEPS)


@pytest.fixture(scope="module", params=["hh", "oasst"])
def runs(request) -> Runs:
    return request.getfixturevalue(f"{request.param}_runs")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "unpacked"])
def test_every_layout_follows_the_unpacked_run(runs, layout):
    expected = runs("unpacked", LAYOUTS["unpacked"])
    assert_it_learns(expected[0])
    trajectory = runs(layout, LAYOUTS[layout])
    assert_same_trajectory(trajectory, expected)


def test_the_layouts_are_different_work(oasst_runs):
    """Tokens run at the first step, in the order of what they share."""
    executed = {name: oasst_runs(name, x)[0][0]["tokens/executed"] for name, x in LAYOUTS.items()}
    logical = oasst_runs("none", LAYOUTS["none"])[0][0]["tokens/logical"]
    assert executed["tree"] < executed["response"] < executed["none"] == logical
    assert executed["tree"] < executed["pair"] < executed["none"] < executed["unpacked"]


@pytest.mark.parametrize(
    ("runs", "unshared", "loss"),
    [
        ("hh", "unpacked", {"label_smoothing": 0.1, "beta": 0.3}),
        ("oasst", "response", {"weighting": "group"}),
        ("hh", "none", {"loss_type": "ipo"}),
    ],
    indirect=["runs"],
    ids=["smoothing", "group", "ipo"],
)
def test_other_losses_do_not_depend_on_sharing(runs, unshared, loss):
    plain = runs(unshared, LAYOUTS[unshared])[0]
    name = ", ".join(loss)
    expected = runs(f"{name}, {unshared}", LAYOUTS[unshared], FEW_STEPS, loss=loss)
    assert abs(expected[0][2]["loss"] - plain[2]["loss"]) > 1e-3, "the setting changes nothing"
    trajectory = runs(f"{name}, tree", LAYOUTS["tree"], FEW_STEPS, loss=loss)
    assert_same_trajectory(trajectory, expected)


@pytest.mark.parametrize("layout", ["tree", "pair"])
def test_dense_attention_and_recompute_follow_it_too(hh_runs, layout):
    model = {
        "attention_backend": "dense",
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "lm_head_chunk_size": 100,
    }
    trajectory = hh_runs(f"dense, {layout}", LAYOUTS[layout], model=model)
    assert_same_trajectory(trajectory, hh_runs("unpacked", LAYOUTS["unpacked"]))


def test_another_order_of_the_data_does_not_follow_it(hh_runs):
    """So the comparison can fail."""
    expected = hh_runs("unpacked", LAYOUTS["unpacked"])
    trajectory = hh_runs("other order", {**LAYOUTS["tree"], "seed": 4321})
    with pytest.raises(AssertionError):
        assert_same_metrics(trajectory[0], expected[0])
    with pytest.raises(AssertionError):
        assert_same_weights(trajectory[1], expected[1])


@pytest.mark.parametrize(
    ("source", "capacity", "unshared", "steps"),
    [("few_hh", 500, "none", STEPS), ("few_oasst", 7000, "response", STEPS // 2)],
    ids=["hh", "oasst"],
)
def test_rows_per_step_follows_the_unshared_run_on_its_own_plan(
    request, tmp_path, source, capacity, unshared, steps
):
    """Packing decides who shares a step; unshared rows of the same groups do the same."""
    dataset = request.getfixturevalue(source)
    rows = {"global_batch_size": None, "rows_per_step": 1}
    layouts = {"tree": {"row_capacity": capacity}, unshared: LAYOUTS[unshared]}
    composition, weights = None, []
    for sharing, layout in layouts.items():
        config = configure(
            tmp_path / sharing,
            dataset,
            data={**layout, **rows, "sharing": sharing},
            train={"steps": steps},
        )
        with join_world(config.parallel, config.train.seed) as world:
            run = prepare(config, world)
            composition = composition or run.sampler.composition
            run.sampler = replace(run.sampler, composition=composition)
            try:
                run.run()
            finally:
                run.close()
            parameters = run.policy.chunks[0].named_parameters()
            weights.append({n: p.detach().clone() for n, p in parameters})
    assert isinstance(composition, RowBatches) and composition.num_steps(1) > 1
    expected = lines(tmp_path / unshared)
    assert_it_learns(expected)
    assert_same_trajectory((lines(tmp_path / "tree"), weights[0]), (expected, weights[1]))


@pytest.mark.parametrize("layout", ["tree", "pair", "response", "none", "unpacked"])
def test_bfloat16_begins_at_ln_2_and_learns(few_hh, tmp_path, layout):
    config = configure(
        tmp_path,
        few_hh,
        data=LAYOUTS[layout],
        model={"dtype": "bfloat16"},
        train={"steps": STEPS},
    )
    rows = trained(config)
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-5
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["loss"] < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hh_pairs", "oasst_trees"])
def test_whole_sets(data_dir, tmp_path, name):
    options = BuildOptions(max_length=16384, overflow="drop")
    build_dataset([data_dir / f"{name}.jsonl.gz"], "bytes", tmp_path / "set", options)
    runs = Runs(tmp_path, str(tmp_path / "set"))
    expected = runs("unpacked", LAYOUTS["unpacked"])
    assert abs(expected[0][0]["loss"] - math.log(2)) < 1e-5
    for layout in ("tree", "pair", "response", "none"):
        assert_same_trajectory(runs(layout, LAYOUTS[layout]), expected)
