"""The check of the first step. Runs that it stops: tests/numerics/test_first_loss.py."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from loss_tables import objective, one_pair

from megatron_prefix.errors import RunError
from megatron_prefix.objectives import Objective
from megatron_prefix.train.first_step import check_first_step

EXACT = SimpleNamespace(rounding=0.0)


def log_of(
    own: Objective,
    ref_logps: list[float],
    num_tokens: list[int] | None = None,
    logratios: list[float] | None = None,
) -> dict:
    """The log of one row with one pair if policy and reference are equal, but for `logratios`;
    1 / 16 of each log-probability is the response's noise."""
    ref = torch.tensor(ref_logps, dtype=torch.float64)
    start, slopes = own.start(one_pair(ref, torch.tensor(num_tokens or [9, 8])), None)
    moved = torch.tensor(logratios or [0.0, 0.0], dtype=torch.float64)
    return {"start": start, "slopes": slopes, "logratios": moved, "noise": ref.abs() / 16}


def empty_log() -> dict:
    nothing = torch.zeros(0, dtype=torch.float64)
    return {"start": nothing.sum()} | dict.fromkeys(("slopes", "logratios", "noise"), nothing)


def test_rewards_of_0_and_ln_2_pass(world):
    own = objective()
    logs = [log_of(own, [-50.0, -60.0], logratios=[0.0, 1e-7]), empty_log()]
    check_first_step(math.log(2), logs, own, EXACT, world)


@pytest.mark.parametrize(
    ("loss", "logratio"), [(math.log(2) + 1e-3, 0.0), (math.log(2), 1e-2), (math.nan, 0.0)]
)
def test_another_loss_or_reward_does_not(world, loss, logratio):
    logs = [log_of(objective(), [-50.0, -60.0], logratios=[0.0, logratio])]
    with pytest.raises(RunError, match="loss.loss_type: sigmoid must start with .*ln 2"):
        check_first_step(loss, logs, objective(), EXACT, world)


@pytest.mark.parametrize(
    ("loss", "near", "far", "expected"),
    [
        ({"loss_type": "ipo"}, 25.1, 24.0, "a loss of 1 / (4 beta^2) = 25.00000000"),
        ({"loss_type": "sppo_hard"}, 60.0, 120.0, "a loss of 1 / (2 beta^2) = 50.00000000"),
        ({"loss_type": "exo_pair"}, 2.8, 1.0, "-ln 2 - ln(s (1 - s)) / 2 = 2.76123071"),
        ({"loss_type": ["sigmoid", "sft"]}, 2.8, 3.1, "own negative log-likelihood = 2.69314"),
        ({"margin": True}, 1.4, 2.0, "a loss of ln 2 moved by margins = 1.31326"),
    ],
    ids=["ipo", "sppo_hard", "exo_pair", "a list", "a margin"],
)
def test_the_tolerance_follows_the_slope_of_the_loss(world, loss, near, far, expected):
    """In bfloat16 a response of noise 100 may be off by 1.6. Where tokens divide, a loss may be off
    by less: a loss of 24 instead of 25 must not pass because responses are long."""
    own = objective(**loss)
    logs = [log_of(own, [-400.0, -300.0], [200, 150])]
    reference = SimpleNamespace(rounding=2.0**-8)
    check_first_step(near, logs, own, reference, world)
    with pytest.raises(RunError, match=re.escape(expected)):
        check_first_step(far, logs, own, reference, world)


def test_a_loss_without_a_known_start_is_not_checked(world):
    """The order of equal rewards decides LiPO's first loss; its rewards are checked."""
    own = objective(loss_type="lipo_lambda")
    logs = [log_of(own, [-50.0, -60.0])]
    check_first_step(7.0, logs, own, EXACT, world)
    with pytest.raises(RunError, match="lipo_lambda must start with rewards of 0"):
        check_first_step(7.0, [log_of(own, [-5.0, -6.0], logratios=[0.1, 0.0])], own, EXACT, world)
