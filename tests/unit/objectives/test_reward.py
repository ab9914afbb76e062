"""Losses of reward models by hand: Bradley-Terry with margins and centring, scaled, regression."""

import math

import pytest
import torch
from loss_tables import float64, objective, outputs, table

from megatron_prefix.objectives.reward import bradley_terry_loss

CHOSEN, REJECTED, MARGINS = (1.5, -1.0, 0.25), (0.5, 1.0, 0.25), (0.25, 0.0, 2.0)


def column(values, requires_grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


def softplus(x):
    return math.log1p(math.exp(x))


def test_by_hand():
    # -log sigmoid(1) = log(1 + 1/e)
    result = bradley_terry_loss(column(CHOSEN), column(REJECTED))
    assert result.losses.tolist() == pytest.approx(
        [0.31326168751822286, softplus(2.0), math.log(2)], rel=1e-13
    )
    assert result.losses.dtype == torch.float64
    assert result.metrics["rewards/margins"].tolist() == [1.0, -2.0, 0.0]
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]


def test_a_margin_moves_the_loss_and_not_the_rewards():
    result = bradley_terry_loss(column(CHOSEN), column(REJECTED), margins=column(MARGINS))
    expected = [softplus(-0.75), softplus(2.0), softplus(2.0)]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-13)
    assert result.metrics["rewards/margins"].tolist() == [1.0, -2.0, 0.0]


def test_centring_adds_the_square_of_the_sum():
    plain = bradley_terry_loss(column(CHOSEN), column(REJECTED))
    result = bradley_terry_loss(column(CHOSEN), column(REJECTED), center_rewards_coefficient=0.1)
    added = (result.losses - plain.losses).tolist()
    assert added == pytest.approx([0.1 * 2.0**2, 0.0, 0.1 * 0.5**2], rel=1e-12)


@pytest.mark.parametrize("coefficient", [None, 0.3])
@pytest.mark.parametrize("margins", [None, MARGINS])
def test_gradient_by_hand(margins, coefficient):
    """d loss / d chosen = -sigmoid(m - chosen + rejected) + 2 c (chosen + rejected)."""
    chosen, rejected = column(CHOSEN, True), column(REJECTED, True)
    given = None if margins is None else column(margins)
    bradley_terry_loss(
        chosen, rejected, margins=given, center_rewards_coefficient=coefficient
    ).losses.sum().backward()
    for i, (a, b) in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        margin = margins[i] if margins else 0.0
        preference = 1 / (1 + math.exp(a - b - margin))
        centring = 2 * (coefficient or 0.0) * (a + b)
        assert float(chosen.grad[i]) == pytest.approx(centring - preference, rel=1e-12)
        assert float(rejected.grad[i]) == pytest.approx(centring + preference, rel=1e-12)


def test_rewards_carry_no_gradient():
    result = bradley_terry_loss(column(CHOSEN, True), column(REJECTED, True))
    assert result.losses.requires_grad
    assert (
        not result.metrics["rewards/chosen"].requires_grad
        and not result.metrics["rewards/rejected"].requires_grad
    )


def test_large_margins_overflow_nothing():
    result = bradley_terry_loss(column((1e4, -1e4)), column((-1e4, 1e4)))
    assert result.losses.tolist() == [0.0, 2e4]


def test_a_scaled_loss_is_multiplied_by_the_margin():
    """The mean stays over pairs: a margin of 0 counts as a pair without loss."""
    inputs = table(margins=float64([0.0, 1.0, 2.0, 0.5, 3.0]))
    plain = outputs(inputs, "reward", loss_type="bradley_terry").losses
    scaled = outputs(inputs, "reward", loss_type="scaled_bradley_terry")
    assert scaled.losses.tolist() == pytest.approx((inputs.margins * plain).tolist(), rel=1e-13)
    loss, _ = objective("reward", loss_type="scaled_bradley_terry").loss(inputs)
    weights = inputs.pair_weights
    expected = (weights * inputs.margins * plain).sum() / weights.sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-13)


def test_regression_leaves_out_unknown_scores():
    scores = float64([1.0, 2.0, -1.0, 0.0, 4.0, 0.5, 3.0])
    labels = float64([0.5, math.nan, -1.0, 2.0, math.nan, 0.0, 3.5])
    inputs = table(scores=scores.requires_grad_(), labels=labels)
    loss, sums = objective("reward", loss_type="regression").loss(inputs)
    errors = [0.5, 0.0, -2.0, 0.5, -0.5]
    assert float(loss) == pytest.approx(sum(x**2 for x in errors) / 5, rel=1e-14)
    assert sums["mse"].tolist() == pytest.approx([sum(x**2 for x in errors), 5.0])
    loss.backward()
    expected = [0.2, 0.0, 0.0, -0.8, 0.0, 0.2, -0.2]
    assert scores.grad.tolist() == pytest.approx(expected, rel=1e-12)


def test_scores_are_logged_of_what_enters():
    """Both sides of every pair, or every response if the loss is not over pairs."""
    inputs = table()
    pairs = inputs.scores[inputs.pairs]
    pairwise = objective("reward", loss_type="bradley_terry")
    assert pairwise.loss(inputs)[1]["rewards/mean"].tolist() == [float(pairs.sum()), 10.0]
    result = pairwise.extremes(inputs)
    assert result == {"rewards/min": -pairs.min(), "rewards/max": pairs.max()}
    every = objective("reward", loss_type="regression").loss(inputs)[1]["rewards/mean"]
    assert every.tolist() == pytest.approx([float(inputs.scores.sum()), 7.0])
    assert objective().extremes(inputs) == {}
