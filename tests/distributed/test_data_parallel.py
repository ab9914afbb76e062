"""Two processes follow the trajectory of one: plain and distributed optimizer.

All runs of two processes are made by the same two, which call the program once per run. The data
are conversations of several turns; row capacity cuts a step into several rows, and the last step
has a single group, so that one of the two processes has nothing but an empty row there.
"""

from __future__ import annotations

import numpy as np
import pytest
from runs import (
    BATCH,
    CUT,
    NUM_GROUPS,
    NUM_STEPS,
    TIMEOUT_S,
    TOLERANCES,
    Runs,
    on_processes,
)

from megatron_prefix.__main__ import main
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.testing import write_random_set

pytestmark = pytest.mark.sample

ZERO = {"parallel": {"use_distributed_optimizer": True}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """One-process runs here, then all two-process runs by the same two processes."""
    runs = Runs(tmp_path_factory.mktemp("data_parallel"))
    ref = str(runs.folder / "ref-1")
    known = {"loss": {"reference": "precomputed", "ref_logps": ref}}
    assert main(runs.train("one")) == 0
    assert main(runs.train("one zero", **ZERO)) == 0
    assert main(["score", "--config", runs.config("score"), "--output", ref]) == 0
    mixed = {
        "data": {
            "train": [
                {"prefix": runs.data, "weight": 2},
                {"prefix": write_random_set(runs.folder / "second", 5, 7), "weight": 1},
            ],
            "valid": {"held": runs.valid},
            **{"row_capacity": runs.row_capacity, "global_batch_size": BATCH, "seed": 3},
        },
        "train": {"steps": NUM_STEPS, "eval_interval": CUT},
    }
    assert main(runs.train("mixed one", **mixed)) == 0
    runs.cut("one zero", "zero 1 to 2")
    runs.cut("one", "plain 1 to 2")
    runs.cut("one", "plain 1 to zero 2")
    commands = [
        runs.train("plain"),
        runs.train("zero", **ZERO),
        runs.train("precomputed", **ZERO, **known),
        runs.train("mixed", **ZERO, **mixed),
        runs.train("zero 1 to 2", **ZERO),
        runs.train("plain 1 to 2"),
        runs.train("plain 1 to zero 2", **ZERO),
        ["score", "--config", runs.config("score"), "--output", str(runs.folder / "ref-2")],
    ]
    on_processes(2, runs.folder, commands, TIMEOUT_S)
    runs.cut("zero", "zero 2 to 1")
    runs.cut("plain", "plain 2 to 1")
    runs.cut("zero", "zero 2 to plain 1")
    assert main(runs.train("zero 2 to 1", **ZERO)) == 0
    assert main(runs.train("plain 2 to 1")) == 0
    assert main(runs.train("zero 2 to plain 1")) == 0
    return runs


NAMES = ["plain", "zero", "precomputed"]
RESUMED = ["plain 1 to 2", "zero 1 to 2", "plain 2 to 1", "zero 2 to 1"]
RESUMED += ["plain 1 to zero 2", "zero 2 to plain 1"]


def assert_same_lines(rows: list[dict], expected: list[dict]) -> None:
    """The same steps and keys, values within TOLERANCES, counts exactly."""
    assert [(r["step"], *r) for r in rows] == [(r["step"], *r) for r in expected]
    for ours, theirs in zip(rows, expected, strict=True):
        for key, value in theirs.items():
            tolerance = TOLERANCES.get(key.removeprefix("eval_").removeprefix("held/"))
            if tolerance is not None:
                error = abs(ours[key] - value) / max(abs(value), 1e-2)
                assert error <= tolerance, (theirs["step"], key, ours[key], value)
            elif key in ("num_pairs", "tokens/logical", "tokens/targets", "rows/projected"):
                assert ours[key] == value, (theirs["step"], key)


@pytest.mark.parametrize("name", NAMES + RESUMED)
def test_two_processes_follow_one(runs, name):
    expected = runs.lines("one")
    assert [r["step"] for r in expected] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert_same_lines(runs.lines(name), expected)


@pytest.mark.parametrize("name", NAMES + RESUMED)
def test_two_processes_end_at_the_same_weights(runs, name):
    weights, expected = runs.weights(name), runs.weights("one")
    assert weights.keys() == expected.keys()
    worst = max(float((weights[k] - x).abs().max()) for k, x in expected.items())
    assert worst <= 1e-4, worst


def test_two_processes_follow_one_on_several_data_sets(runs):
    expected = runs.lines("mixed one")
    assert sum("eval_held/loss" in row for row in expected) == 4
    assert_same_lines(runs.lines("mixed"), expected)


def test_a_distributed_optimizer_alone_changes_nothing(runs):
    assert_same_lines(runs.lines("one zero"), runs.lines("one"))


def test_the_steps_have_several_rows_and_the_last_one_an_empty_one(runs):
    """What the comparison above is about: else it would prove little."""
    dataset = PreferenceDataset(runs.data)
    sizes = [dataset.group_num_tokens(g) for g in range(NUM_GROUPS)]
    assert min(sum(sizes[i : i + BATCH]) for i in range(NUM_GROUPS - BATCH)) > 120
    first, *_, last = [r for r in runs.lines("plain") if "loss" in r]
    one = [r for r in runs.lines("one") if "loss" in r]
    assert last["tokens/logical"] < first["tokens/logical"]
    assert last["tokens/executed"] > one[-1]["tokens/executed"], "no empty row"


def test_a_sidecar_is_the_same_from_two_processes(runs):
    """To rounding: rows are cut differently."""
    from safetensors.numpy import load_file

    first, second = (load_file(runs.folder / f"ref-{n}") for n in (1, 2))
    assert first.keys() == second.keys() and len(first) == 2
    for name, logps in first.items():
        assert np.abs(second[name] - logps).max() <= 1e-4 * max(1, np.abs(logps).max())


def test_metrics_are_written_once(runs):
    """Two processes, one line a step and no run beside it."""
    for name in NAMES + RESUMED:
        assert [p.name for p in runs.output(name).glob("metrics*")] == ["metrics.jsonl"]
