"""A checkpoint and the run that loads it agree, or every difference is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prefix.checkpoint.agreement import check_model, check_run, schedule_changes
from megatron_prefix.errors import InputError

OURS = {"data.seed": 7, "data.rows_per_step": 2, "train.epochs": None, "loss.beta": 0.1}


def test_every_difference_of_another_run_is_named():
    assert check_run(Path("iter"), dict(OURS), OURS) == []
    saved = {**OURS, "data.seed": 1234, "data.rows_per_step": None, "old": 1}
    with pytest.raises(InputError) as refused:
        check_run(Path("iter"), saved, OURS)
    assert str(refused.value).startswith(
        "iter: saved by another run (data.seed: 1234 in the checkpoint, 7 now, "
        "data.rows_per_step: None in the checkpoint, 2 now, old: 1 in the checkpoint, None now); "
        "resume with the same settings"
    )


def test_a_setting_that_the_checkpoint_does_not_name_has_the_value_of_its_time():
    check_run(Path("iter"), OURS, {**OURS, "data.sort_by_length": False})
    with pytest.raises(InputError, match="data.sort_by_length: False in the checkpoint, True now"):
        check_run(Path("iter"), OURS, {**OURS, "data.sort_by_length": True})
    with pytest.raises(InputError, match="loss.comparisons: 'all' in the checkpoint, 'adjacent'"):
        check_run(Path("iter"), OURS, {**OURS, "loss.comparisons": "adjacent"})


def test_a_loss_that_an_old_checkpoint_does_not_name_is_told():
    saved = {key: value for key, value in OURS.items() if key != "loss.beta"}
    assert check_run(Path("iter"), saved, OURS) == ["loss.beta"]


def test_what_is_no_run_is_refused():
    with pytest.raises(InputError, match="data.seed: None in the checkpoint, 7 now"):
        check_run(Path("iter"), "nonsense", OURS)
    with pytest.raises(InputError, match="saved by another model .* give the sizes"):
        check_model(Path("iter"), "nonsense", {"num_layers": 2})


def test_a_setting_of_rotary_scaling_that_is_not_set_may_be_unknown():
    scaling = {"type": "linear", "factor": 4.0}
    check_model(Path("iter"), {"rope_scaling": scaling}, {"rope_scaling": {**scaling, "new": None}})
    with pytest.raises(InputError, match="rope_scaling: .*4.0.* in the checkpoint, .*2.0"):
        check_model(Path("iter"), {"rope_scaling": scaling}, {"rope_scaling": {"factor": 2.0}})


def test_changes_of_the_schedule_are_texts():
    ours = {"optimizer.lr": 1e-4, "optimizer.new": 1, "steps of the run": 8}
    assert schedule_changes(None, ours) == []
    assert schedule_changes({"optimizer.lr": 1e-3, "steps of the run": 8}, ours) == [
        "optimizer.lr: 0.001 in the checkpoint, 0.0001 now"
    ]
