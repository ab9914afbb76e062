"""The warning that chosen responses lose probability: once, and not by chance."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_prefix.train.falling import WINDOW, FallingWatch, mean_and_error


def warnings(name: str, chosen: list[float], rejected: float = -5.0) -> list[tuple[int, str]]:
    watch = FallingWatch()
    texts = (
        (step, watch.warning(step, {f"{name}/chosen": x, f"{name}/rejected": rejected}))
        for step, x in enumerate(chosen, 1)
    )
    return [(step, text) for step, text in texts if text is not None]


def test_it_comes_once_with_step_and_figures():
    ((step, text),) = warnings("logratios", [-2.0] * 60)
    assert step == WINDOW
    assert "step 20: the chosen responses become less likely" in text
    assert "-2.00 nats against the reference on average, that of the rejected ones -5.00" in text
    assert "loss.loss_type" in text and "optimizer.lr" in text


@pytest.mark.parametrize("value", [3.0, 0.0, -0.9])
def test_a_rise_or_a_small_fall_is_silent(value):
    assert warnings("logratios", [value] * 60) == []


def test_scatter_is_not_a_fall():
    """A mean of -1.5 nats whose standard error is 1."""
    rng = np.random.default_rng(0)
    scattered = -1.5 + np.sqrt(WINDOW) * rng.standard_normal(WINDOW)
    assert warnings("logratios", scattered.tolist()) == []


def test_without_a_reference_the_first_steps_count():
    assert warnings("logps", [-200.0] * 100) == []
    ((step, text),) = warnings("logps", [-200.0] * 30 + [-204.0] * 30)
    assert 40 < step <= 50 and f"against the first {WINDOW} steps" in text


def test_reward_models_have_no_such_metric():
    assert FallingWatch().warning(1, {"rewards/chosen": -9.0}) is None


def test_mean_and_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx((1 / 3) ** 0.5))
