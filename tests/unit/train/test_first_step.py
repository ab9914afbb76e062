"""The check of the first step. Runs that it stops: tests/numerics/test_first_loss.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_prefix.config import LossConfig
from megatron_prefix.errors import RunError
from megatron_prefix.objectives import check
from megatron_prefix.train.first_step import check_first_step

EXACT = SimpleNamespace(rounding=0.0)


def log_of(logratios: list[float], ref_logps: list[float], tokens: list[int]) -> dict:
    values = {"logratios": logratios, "ref_logps": ref_logps, "tokens": tokens}
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in values.items()}


def test_rewards_of_0_and_ln_2_pass(world):
    logs = [log_of([0.0, 1e-7], [50.0, 60.0], [9, 8]), log_of([], [], [])]
    check_first_step(math.log(2), logs, check(LossConfig()), EXACT, world)


@pytest.mark.parametrize(
    ("loss", "logratio"), [(math.log(2) + 1e-3, 0.0), (math.log(2), 1e-2), (math.nan, 0.0)]
)
def test_another_loss_or_reward_does_not(world, loss, logratio):
    logs = [log_of([0.0, logratio], [50.0, 60.0], [9, 8])]
    with pytest.raises(RunError, match="loss.loss_type: sigmoid must start with .*ln 2"):
        check_first_step(loss, logs, check(LossConfig()), EXACT, world)


def test_the_tolerance_of_ipo_is_per_token(world):
    """A loss of 24 instead of 25 must not pass in bfloat16 because responses are long."""
    objective = check(LossConfig(loss_type="ipo"))
    logs = {"logratios": [0.0, 0.0], "ref_logps": [400.0, 300.0], "tokens": [200, 150]}
    log = {name: torch.tensor(x, dtype=torch.float64) for name, x in logs.items()}
    reference = SimpleNamespace(rounding=2.0**-8)
    check_first_step(25.1, [log], objective, reference, world)
    with pytest.raises(RunError, match="= 25.00000000 .within"):
        check_first_step(24.0, [log], objective, reference, world)
