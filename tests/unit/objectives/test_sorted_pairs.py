"""Losses over sorted sides on three pairs, with numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_tables import float64, objective, one_pair, outputs, table

B = 0.2
"""beta"""


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def three_pairs(scores=(-10.0, -20.0, -30.0, -12.5, -6.0, -6.0)):
    """Log-ratios (2, -5), (-1, 1.5) and (0, 0): policy differences 10, -17.5 and 0, the
    reference's 3, -15 and 0."""
    return table(
        scores=float64(scores),
        ref_logps=float64([-12.0, -15.0, -29.0, -14.0, -6.0, -6.0]),
        num_tokens=torch.tensor([4, 5, 20, 8, 3, 3]),
        pairs=torch.tensor([[0, 1], [2, 3], [4, 5]]),
        margins=torch.zeros(3, dtype=torch.float64),
        pair_weights=torch.ones(3, dtype=torch.float64),
        ranks=torch.tensor([0, 1] * 3),
        labels=torch.zeros(6, dtype=torch.float64),
        members=torch.tensor([[0, 1], [2, 3], [4, 5]]),
        set_weights=torch.ones(3, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("name", "gaps"),
    [
        # sorted [-17.5 0 10] less sorted [-15 0 3]
        ("aot", [-2.5, 0.0, 7.0]),
        # sorted [-1 0 2] less sorted [-5 0 1.5]
        ("aot_unpaired", [4.0, 0.0, 0.5]),
    ],
)
def test_sorted_sides_are_compared(name, gaps):
    result = outputs(three_pairs(), loss_type=name, beta=B)
    assert result.losses.tolist() == pytest.approx([softplus(-B * x) for x in gaps], rel=1e-12)
    smooth = outputs(three_pairs(), loss_type=name, beta=B, label_smoothing=0.1)
    expected = [0.9 * softplus(-B * x) + 0.1 * softplus(B * x) for x in gaps]
    assert smooth.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert result.metrics["rewards/chosen"].tolist() == pytest.approx([0.4, -0.2, 0.0])
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]


def test_the_slope_goes_to_the_pair_at_that_place():
    """The smallest policy difference is that of pair 1, so its slope is that of the gap -2.5."""
    inputs = three_pairs()
    scores = inputs.scores.clone().requires_grad_()
    own = objective(loss_type="aot", beta=B)
    (slopes,) = torch.autograd.grad(own.loss(replace(inputs, scores=scores))[0], [scores])
    by_pair = [B / (1 + math.exp(B * x)) / 3 for x in (7.0, -2.5, 0.0)]
    assert slopes.tolist() == pytest.approx([y for x in by_pair for y in (-x, x)], rel=1e-12)


def test_one_pair_is_sigmoid():
    inputs = replace(
        one_pair(float64([-3.0, -7.0]), torch.tensor([2, 3])), ref_logps=float64([-4.0, -6.0])
    )
    for name in ("aot", "aot_unpaired"):
        alone = objective(loss_type=name).loss(inputs)[0]
        assert float(alone) == pytest.approx(float(objective().loss(inputs)[0]), rel=1e-15)


def test_equal_values_keep_their_order():
    """Two equal differences: the first pair takes the first place, on every rank alike."""
    inputs = three_pairs(scores=(-10.0, -20.0, -2.0, -12.0, -6.0, -6.0))
    scores = inputs.scores.clone().requires_grad_()
    own = objective(loss_type="aot", beta=B)
    (slopes,) = torch.autograd.grad(own.loss(replace(inputs, scores=scores))[0], [scores])
    # sorted [0 10 10] of the pairs 2, 0, 1, less sorted [-15 0 3]
    by_pair = [B / (1 + math.exp(B * x)) / 3 for x in (10.0, 7.0, 15.0)]
    assert slopes[::2].tolist() == pytest.approx([-x for x in by_pair], rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_pair_options_that_have_no_place(name):
    from megatron_prefix.errors import InputError

    for option in ({"use_weighting": True}, {"margin": True}, {"dpop_lambda": 1.0}):
        with pytest.raises(InputError, match=f"{name} does not use it"):
            objective(loss_type=name, **option)
    assert objective(loss_type=name).needs_step and not objective().needs_step
    assert objective(loss_type=[name, "sft"]).needs_step
