"""Whole runs with adapters under labelled responses, several references, divided groups and shadow
steps: how the responses lie in rows changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_sets import write_labelled_set
from ranked_sets import write_ranked_set
from reference_files import write_references
from small_runs import assert_same_runs, configure, saved_weights, timeless, trained

from megatron_prefix.config import Config
from megatron_prefix.train.pace import MEASURED

STEPS = 4
LORA, MODEL = {"r": 4, "lora_alpha": 8}, {"init_method_std": 0.1}
UNPACKED = {"sharing": "none", "packing": False, "row_capacity": None, "micro_batch_size": 6}
TREE = {"sharing": "tree", "row_capacity": 200}
OF_ROWS = ("tokens/executed", "tokens/targets", "tokens/repeated", "rows/projected")
SKIPPED = (*MEASURED, *OF_ROWS, "logps/pass_difference")
LABELLED = {
    "kto": {"loss_type": "kto", "undesirable_weight": 0.8},
    "bco": {"loss_type": "bco", "beta": 0.5},
    "apo": {"loss_type": "apo_zero_unpaired"},
}
SEVERAL = {
    "harmonic": {"reference_mixture": "harmonic", "reference_weights": "sliding_window"},
    "multi, whole step": {"loss_type": "aot_unpaired", "reference_mixture": "multi_dpo"},
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> str:
    return write_labelled_set(tmp_path_factory.mktemp("labels") / "set", 0, 10, mismatches=True)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> str:
    return write_ranked_set(tmp_path_factory.mktemp("ranked") / "set", 0, 10, weighted=False)


def run_of(folder: Path, dataset: str, data: dict, loss: dict, **train: object) -> Config:
    return configure(
        folder,
        dataset,
        data={"valid": dataset, "global_batch_size": 4, "seed": 3, **data},
        loss=loss,
        lora=LORA,
        model=MODEL,
        optimizer={"lr": 5e-3},
        train={"steps": STEPS, "save": str(folder / "saved"), **train},
    )


def compare(folder: Path, dataset: str, loss: dict, *layouts: dict) -> list[dict]:
    """The lines of the first layout's run, which those of the others follow."""
    runs = []
    for number, data in enumerate(layouts):
        config = run_of(folder / str(number), dataset, data, loss)
        runs.append((trained(config), saved_weights(config.train.save, STEPS)))
    for other in runs[1:]:
        assert_same_runs(other, runs[0], SKIPPED, {}, has_same_keys=False)
    weights = runs[0][1]
    assert all(".adapters." in name for name in weights) and len(weights) == 2 * 7 * 2
    return runs[0][0]


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_responses_follow_the_unpacked_run(name, labels, tmp_path):
    """The mismatches of `kto` are scored with adapters, and by the reference without."""
    rows = compare(tmp_path, labels, LABELLED[name], TREE, UNPACKED)
    if name == "kto":
        assert max(row.get("kl", 0.0) for row in rows) > 1e-4, "the adapters change no mismatch"


@pytest.mark.parametrize("name", SEVERAL)
def test_several_references_follow_the_unpacked_run(name, ranked, tmp_path):
    """One of their files is that of the base."""
    references = write_references(tmp_path / "files", run_of(tmp_path / "score", ranked, TREE, {}))
    compare(tmp_path, ranked, {**SEVERAL[name], "references": references}, TREE, UNPACKED)


def test_divided_groups_follow_the_unpacked_run(ranked, tmp_path):
    split = {"row_capacity": 44, "oversized": "split"}
    compare(tmp_path, ranked, {"loss_type": "sigmoid"}, split, UNPACKED)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_shadow_steps_change_nothing(loss_type, ranked, tmp_path, capsys):
    runs = [
        trained(run_of(tmp_path / str(steps), ranked, TREE, loss, shadow_steps=steps))
        for steps in (0, 2)
        for loss in [{"loss_type": loss_type}]
    ]
    assert timeless(runs[0]) == timeless(runs[1])
    assert "the same to rounding" in capsys.readouterr().out
