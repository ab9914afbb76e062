"""The newest checkpoints stay, and the best one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_config

from megatron_prefix.checkpoint.keeping import BEST, Keeping, note_best, read_best, surplus
from megatron_prefix.checkpoint.save_load import complete_steps
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.testing import write_random_set
from megatron_prefix.train.setup import prepare_trainer

METRIC = "eval_rewards/accuracies"


def test_what_goes():
    steps = [10, 20, 30, 40, 50]
    assert surplus(steps, 50, 20, 2) == [10, 30]
    assert surplus(steps, 50, None, 2) == [10, 20, 30]
    assert surplus(steps, 50, None, None) == surplus(steps, 50, 20, 7) == []
    assert surplus(steps, 30, None, 1) == [10, 20], "40 and 50 are from before the run went back"


@pytest.mark.parametrize(("mode", "best"), [("max", 3), ("min", 2)])
def test_the_best_is_noted(tmp_path, mode, best):
    keeping = Keeping(metric=METRIC, mode=mode)
    assert read_best(tmp_path) is None
    for step, value in ((1, 0.5), (2, 0.25), (3, 0.75), (4, 0.75), (5, 0.25)):
        note_best(tmp_path, step, value, keeping)
    assert read_best(tmp_path)["step"] == best
    note_best(tmp_path, 1, 0.5, keeping)
    assert read_best(tmp_path)["step"] == 1, "the run went back to a step before the best"


def test_another_metric_starts_anew(tmp_path):
    note_best(tmp_path, 1, 9.0, Keeping(metric="eval_loss"))
    note_best(tmp_path, 2, 0.5, Keeping(metric=METRIC))
    assert read_best(tmp_path) == {"step": 2, "metric": METRIC, "value": 0.5}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": "x", "value": 1, "metric": "m"}'])
def test_a_damaged_note_is_none(tmp_path, text):
    (tmp_path / BEST).write_text(text)
    assert read_best(tmp_path) is None


def run(world, folder: Path, steps: int, **train):
    prefix = str(folder / "set")
    if not Path(f"{prefix}.json").exists():
        write_random_set(folder / "set", 0, 8)
    saved = str(folder / "saved")
    settings = {"steps": steps, "save": saved, "load": saved, "save_interval": 1} | train
    settings |= {"eval_interval": 1}
    data = {"valid": prefix}
    config = tiny_config(prefix, folder / "run", train=settings, data=data)
    dataset = PreferenceDataset(prefix)
    trainer = prepare_trainer(config, dataset, {"": dataset}, world)
    try:
        trainer.run()
    finally:
        trainer.close()


def test_a_run_keeps_the_last_and_the_best(world, tmp_path):
    best = {"metric": "eval_loss", "mode": "max"}
    run(world, tmp_path, 4, keep_last=2, keep_best=best)
    saved = tmp_path / "saved"
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {x["step"]: x["eval_loss"] for x in lines if "eval_loss" in x and x["step"]}
    worst = max(losses, key=lambda step: losses[step])
    assert read_best(saved) == {
        **{"step": worst, "metric": "eval_loss", "value": losses[worst]},
    }
    assert complete_steps(saved) == sorted({worst, 3, 4})
    run(world, tmp_path, 6, keep_last=1)
    assert complete_steps(saved) == [6], "keep_best is gone from the configuration"
    assert not list(saved.glob(".iter*"))


def test_a_metric_that_is_not_evaluated_is_refused_before_training(world, tmp_path):
    with pytest.raises(InputError, match="keep_best.metric = eval_lose: .* it has eval_"):
        run(world, tmp_path, 2, keep_best={"metric": "eval_lose"})
    assert complete_steps(tmp_path / "saved") == []
