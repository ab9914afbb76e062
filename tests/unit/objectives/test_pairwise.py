"""DPO and IPO by hand and against autograd. test_by_hand.py has the other losses."""

import math

import pytest
import torch

from megatron_prefix.objectives.pairwise import dpo_loss, ipo_loss


def pairs(*rows, requires_grad=False):
    """Rows of (chosen, rejected, ref_chosen, ref_rejected) as four float64 columns."""
    return [
        torch.tensor(column, dtype=torch.float64, requires_grad=requires_grad)
        for column in zip(*rows, strict=True)
    ]


def test_by_hand():
    # rewards 0.1 (-10 + 12) = 0.2 and 0.1 (-20 + 15) = -0.5, so the margin is 0.7
    result = dpo_loss(*pairs((-10.0, -20.0, -12.0, -15.0)), beta=0.1)
    assert result.metrics["rewards/chosen"].tolist() == pytest.approx([0.2])
    assert result.metrics["rewards/rejected"].tolist() == pytest.approx([-0.5])
    assert result.metrics["rewards/margins"].tolist() == pytest.approx([0.7])
    assert result.losses.tolist() == pytest.approx([0.403186048885458], rel=1e-13)
    assert result.losses.dtype == torch.float64


def test_label_smoothing_by_hand():
    # 0.9 * 0.403186… + 0.1 * 1.103186…
    result = dpo_loss(*pairs((-10.0, -20.0, -12.0, -15.0)), beta=0.1, label_smoothing=0.1)
    assert result.losses.tolist() == pytest.approx([0.473186048885458], rel=1e-13)
    assert result.metrics["rewards/margins"].tolist() == pytest.approx([0.7])


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.49])
@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_equal_policies_give_ln_2(beta, smoothing):
    result = dpo_loss(
        *pairs((-3.0, -7.0, -3.0, -7.0), (-900.0, -2.0, -900.0, -2.0)),
        beta=beta,
        label_smoothing=smoothing,
    )
    assert result.losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert result.metrics["rewards/margins"].tolist() == [0.0, 0.0]
    assert result.metrics["rewards/accuracies"].tolist() == [0.5, 0.5]


def test_a_tie_counts_one_half():
    result = dpo_loss(*pairs((-1.0, -2, -2, -2), (-2.0, -2, -2, -2), (-3.0, -2, -2, -2)), beta=1.0)
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_by_hand(smoothing):
    """d loss / d chosen = beta (s sigmoid(m) - (1 - s) sigmoid(-m)), and its negative."""
    columns = pairs((-10.0, -20.0, -12.0, -15.0), (-5.0, -1.0, -6.0, -4.0), requires_grad=True)
    dpo_loss(*columns, beta=0.1, label_smoothing=smoothing).losses.sum().backward()
    for i, margin in enumerate([0.7, -0.2]):
        up, down = 1 / (1 + math.exp(-margin)), 1 / (1 + math.exp(margin))
        slope = 0.1 * (smoothing * up - (1 - smoothing) * down)
        assert columns[0].grad[i].item() == pytest.approx(slope, rel=1e-12)
        assert columns[1].grad[i].item() == pytest.approx(-slope, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_against_autograd_of_the_plain_formula(smoothing):
    generator = torch.Generator().manual_seed(0)
    columns = [-10 * torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(4)]
    ours = [x.clone().requires_grad_() for x in columns]
    plain = [x.clone().requires_grad_() for x in columns]
    losses = dpo_loss(*ours, beta=0.3, label_smoothing=smoothing).losses
    odds = 0.3 * ((plain[0] - plain[1]) - (plain[2] - plain[3]))
    prob = 1 / (1 + torch.exp(-odds))
    expected = -(1 - smoothing) * torch.log(prob) - smoothing * torch.log(1 - prob)
    assert torch.allclose(losses, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(losses.sum(), ours),
        torch.autograd.grad(expected.sum(), plain),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda *x: dpo_loss(*x, beta=0.3, label_smoothing=smoothing).losses,
        [x[:4].clone().requires_grad_() for x in columns],
    )


def test_far_margins_stay_finite():
    columns = pairs((-1.0, -90000.0, -5.0, -5.0), (-90000.0, -1.0, -5.0, -5.0), requires_grad=True)
    result = dpo_loss(*columns, beta=1.0)
    result.losses.sum().backward()
    assert result.losses.tolist() == pytest.approx([0.0, 89999.0])
    assert columns[0].grad.tolist() == pytest.approx([0.0, -1.0])


def test_rewards_carry_no_gradient():
    columns = pairs((-1.0, -2.0, -3.0, -4.0), requires_grad=True)
    result = dpo_loss(*columns, beta=1.0)
    assert result.losses.requires_grad
    assert not any(x.requires_grad for x in result.metrics.values())


def test_no_pairs_give_no_losses():
    empty = [torch.zeros(0, dtype=torch.float64) for _ in range(4)]
    result = dpo_loss(*empty, beta=0.1)
    assert result.losses.shape == result.metrics["rewards/accuracies"].shape == (0,)
    assert result.losses.sum().item() == 0.0


class TestIPO:
    BY_HAND = (-10.0, -20.0, -12.0, -15.0, 4, 5)
    """u = 2 over 4 tokens and v = -5 over 5: the gap is 0.5 + 1 = 1.5."""

    def columns(self, *rows, requires_grad=False):
        logps = pairs(*(row[:4] for row in rows), requires_grad=requires_grad)
        counts = [torch.tensor(x) for x in zip(*(row[4:] for row in rows), strict=True)]
        return [*logps, *counts]

    def test_by_hand(self):
        result = ipo_loss(*self.columns(self.BY_HAND), beta=0.1)  # (1.5 - 5)^2
        assert result.losses.tolist() == pytest.approx([12.25], rel=1e-14)
        assert result.metrics["rewards/chosen"].tolist() == pytest.approx([0.2])
        assert result.metrics["rewards/rejected"].tolist() == pytest.approx([-0.5])
        assert result.losses.dtype == torch.float64

    def test_every_side_is_divided_by_its_own_length(self):
        other = (*self.BY_HAND[:4], 8, 5)
        result = ipo_loss(*self.columns(other), beta=0.5)  # (0.25 + 1 - 1)^2
        assert result.losses.tolist() == pytest.approx([0.0625], rel=1e-14)

    @pytest.mark.parametrize(("beta", "expected"), [(0.1, 25.0), (0.5, 1.0), (1.0, 0.25)])
    def test_equal_policies(self, beta, expected):
        same = self.columns((-3.0, -7.0, -3.0, -7.0, 1, 9), (-900.0, -2.0, -900.0, -2.0, 300, 2))
        result = ipo_loss(*same, beta=beta)
        assert result.losses.tolist() == pytest.approx([expected] * 2, rel=1e-14)
        assert result.metrics["rewards/margins"].tolist() == [0.0, 0.0]

    def test_gradient_by_hand(self):
        columns = self.columns(self.BY_HAND, requires_grad=True)
        ipo_loss(*columns, beta=0.1).losses.sum().backward()  # 2 (1.5 - 5) / n
        assert columns[0].grad.tolist() == pytest.approx([-7.0 / 4], rel=1e-14)
        assert columns[1].grad.tolist() == pytest.approx([7.0 / 5], rel=1e-14)
        assert not any(x.requires_grad for x in ipo_loss(*columns, beta=0.1).metrics.values())
