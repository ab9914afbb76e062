"""Warm-up and decay: what the settings must agree on."""

from __future__ import annotations

import copy

import pytest
from test_config import GOOD

from megatron_prefix.config import Config, parse_config
from megatron_prefix.errors import InputError


def config(**optimizer) -> Config:
    return parse_config({**copy.deepcopy(GOOD), "optimizer": {"lr": 1e-3, **optimizer}})


@pytest.mark.parametrize(
    ("fraction", "num_steps", "steps"), [(0.1, 30, 3), (0.1, 41, 5), (0.0, 10, 0), (0.5, 1, 1)]
)
def test_a_fraction_is_rounded_up_as_transformers_does(fraction, num_steps, steps):
    import math

    assert config(lr_warmup_fraction=fraction).optimizer.warmup_steps(num_steps) == steps
    assert math.ceil(num_steps * fraction) in (steps, steps + 1), "0.1 x 30 is above 3"


def test_without_a_warm_up_there_is_none():
    assert config().optimizer.warmup_steps(10) == 0
    assert config(lr_warmup_steps=4).optimizer.warmup_steps(10) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_warmup_steps": 0, "lr_warmup_fraction": 0.1}, "lr_warmup_fraction = 0.1: give one"),
        ({"lr_decay_style": "WSD"}, "lr_wsd_decay_steps is missing"),
        ({"lr_wsd_decay_steps": 3}, "has no effect with lr_decay_style: constant"),
        ({"lr_decay_style": "linear", "lr_wsd_decay_style": "cosine"}, "has no effect with"),
        ({"lr_warmup_fraction": 1.0}, "lr_warmup_fraction = 1.0"),
        ({"min_lr": 1.0}, "optimizer.min_lr = 1.0 is above optimizer.lr"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        config(**settings)


def test_what_does_not_fit_into_the_run_is_told():
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_steps": 6}
    assert list(config(**wsd, lr_warmup_steps=4).optimizer.run_faults(10)) == []
    (fault,) = config(**wsd, lr_warmup_fraction=0.5).optimizer.run_faults(10)
    assert "lr_wsd_decay_steps = 6 and 5 steps of warm-up are more than the run's 10" in fault
    (fault,) = config(lr_warmup_fraction=0.95).optimizer.run_faults(10)
    assert "lr_warmup_fraction = 0.95 does not end within the run's 10 steps" in fault
