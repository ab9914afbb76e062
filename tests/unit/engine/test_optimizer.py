"""The learning rate of every step, by hand and as transformers has it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import SIZES, tiny_config
from transformers import get_scheduler

from megatron_prefix.config import ModelConfig
from megatron_prefix.engine.optimizer import build_model, build_policy
from megatron_prefix.model.provider import transformer_config

NUM_STEPS = 10


@pytest.fixture
def rates(world, tmp_path):
    def rates(**optimizer) -> list[float]:
        run = tiny_config("set", tmp_path, optimizer={"lr": 1.0, **optimizer})
        config = transformer_config(ModelConfig(**SIZES), vocab_size=320, seed=1)
        policy = build_policy(build_model(config, world), config, run, NUM_STEPS)
        values = []
        for _ in range(NUM_STEPS):
            values.append(policy.optimizer.param_groups[0]["lr"])
            policy.scheduler.step(increment=1)
        return values

    return rates


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_warm_up_and_decay_are_those_of_transformers(rates, style):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = get_scheduler(style, optimizer, num_warmup_steps=3, num_training_steps=NUM_STEPS)
    for ours in rates(lr_decay_style=style, lr_warmup_fraction=0.25):
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("style", "curve"),
    [
        (None, lambda x: 2 * 0.5**x - 1),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("minus_sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_wsd_warms_up_stays_and_decays_at_the_end(rates, style, curve):
    """Steps 0 to 9 of 10: two of warm-up, then 1 up to step 6, and a quarter further each step."""
    settings = {"lr_decay_style": "WSD", "lr_wsd_decay_steps": 4, "min_lr": 0.2}
    if style is not None:
        settings["lr_wsd_decay_style"] = style
    expected = [0.0, 0.5, *[1.0] * 5, *(0.2 + 0.8 * curve(x / 4) for x in (1, 2, 3))]
    assert rates(**settings, lr_warmup_steps=2) == pytest.approx(expected)
