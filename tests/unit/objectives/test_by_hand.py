"""Losses of language models on three pairs, with numbers worked out by the equations in plain
Python, and what options change."""

import math
from dataclasses import replace

import pytest
import torch
from loss_tables import float64, objective, outputs, table

from megatron_prefix.errors import InputError
from megatron_prefix.objectives.divergences import divergence_scores

# (chosen, rejected, reference of chosen, of rejected, tokens of chosen, of rejected)
PAIRS = (
    (-10.0, -20.0, -12.0, -15.0, 4, 5),
    (-30.0, -12.5, -29.0, -14.0, 20, 8),
    (-6.0, -6.0, -6.0, -6.0, 3, 3),
)
"""Log-ratios (2, -5), (-1, 1.5) and (0, 0)."""


def three_pairs(**columns):
    """The table of these pairs, with other columns if they are given."""
    inputs = table(
        scores=float64([x for pair in PAIRS for x in pair[:2]]),
        ref_logps=float64([x for pair in PAIRS for x in pair[2:4]]),
        num_tokens=torch.tensor([x for pair in PAIRS for x in pair[4:]]),
        pairs=torch.tensor([[0, 1], [2, 3], [4, 5]]),
        margins=float64([0.5, 0.0, 1.0]),
        pair_weights=torch.ones(3, dtype=torch.float64),
        ranks=torch.tensor([0, 1] * 3),
        labels=float64([1.0, 0.25, 0.5, 0.0, 0.75, 0.75]),
        members=torch.tensor([[0, 1], [2, 3], [4, 5]]),
        set_weights=torch.ones(3, dtype=torch.float64),
    )
    return replace(inputs, **columns)


def softplus(x):
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def smooth(d, s):
    return (1 - s) * softplus(-d) + s * softplus(d)


def odds(x):
    return math.exp(x) / (1 - math.exp(x))


def kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def exo(d, s):
    q = sigmoid(d)
    return q * (math.log(q) - math.log(1 - s)) + (1 - q) * (math.log(1 - q) - math.log(s))


B = 0.2
"""beta"""
BY_HAND = {
    "sigmoid": ({}, lambda u, v, n, m: softplus(-B * (u - v))),
    "sigmoid, smoothed": (
        {"label_smoothing": 0.1},
        lambda u, v, n, m: smooth(B * (u - v), 0.1),
    ),
    "robust": (
        {"label_smoothing": 0.1},
        lambda u, v, n, m: (0.9 * softplus(-B * (u - v)) - 0.1 * softplus(B * (u - v))) / 0.8,
    ),
    "hinge": ({}, lambda u, v, n, m: max(0.0, 1 - B * (u - v))),
    "ipo": ({}, lambda u, v, n, m: (u / n - v / m - 2.5) ** 2),
    "sigmoid_norm": ({}, lambda u, v, n, m: softplus(-B * (u / n - v / m))),
    "exo_pair": ({"label_smoothing": 0.01}, lambda u, v, n, m: exo(B * (u - v), 0.01)),
    "discopop": (
        {"discopop_tau": 0.5},
        lambda u, v, n, m: (
            softplus(-B * (u - v)) * (1 - sigmoid(B * (u - v) / 0.5))
            + math.exp(-B * (u - v)) * sigmoid(B * (u - v) / 0.5)
        ),
    ),
    "nca_pair": (
        {},
        lambda u, v, n, m: softplus(-B * u) + softplus(B * u) / 2 + softplus(B * v) / 2,
    ),
    "bco_pair": ({}, lambda u, v, n, m: softplus(-B * u) + softplus(B * v)),
    "sppo_hard": ({}, lambda u, v, n, m: (u - 2.5) ** 2 + (v + 2.5) ** 2),
    "apo_zero": ({}, lambda u, v, n, m: 1 - sigmoid(B * u) + sigmoid(B * v)),
    "apo_down": ({}, lambda u, v, n, m: sigmoid(B * u) + 1 - sigmoid(B * (u - v))),
}
"""Options, and the loss of a pair by its log-ratios u and v and its numbers of tokens n and m."""


@pytest.mark.parametrize("case", BY_HAND)
def test_losses_with_a_reference(case):
    name = case.split(",")[0]
    options, expected = BY_HAND[case]
    result = outputs(three_pairs(), loss_type=name, beta=B, **options)
    logratios = [(c - rc, r - rr, n, m) for c, r, rc, rr, n, m in PAIRS]
    assert result.losses.tolist() == pytest.approx([expected(*x) for x in logratios], rel=1e-12)
    assert result.metrics["rewards/chosen"].tolist() == pytest.approx([0.4, -0.2, 0.0])
    assert result.metrics["rewards/rejected"].tolist() == pytest.approx([-1.0, 0.3, 0.0])
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("name", [x for x in BY_HAND if "," not in x] + ["cpo", "simpo", "orpo"])
def test_each_pair_has_its_own_beta(name):
    """A pair without one has that of the run; values, rewards and slopes are those of one beta."""
    scores = three_pairs().scores.requires_grad_()
    inputs = three_pairs(scores=scores, betas=float64([0.05, float("nan"), 0.7]))
    result = outputs(inputs, loss_type=name, beta=B, pair_beta=True)
    (slopes,) = torch.autograd.grad(result.losses.sum(), scores)
    for pair, beta in enumerate((0.05, B, 0.7)):
        expected = outputs(inputs, loss_type=name, beta=beta)
        (slope,) = torch.autograd.grad(expected.losses[pair], scores)
        own = [2 * pair, 2 * pair + 1]
        assert torch.equal(slopes[own], slope[own])
        assert float(result.losses[pair]) == float(expected.losses[pair])
        for key, values in expected.metrics.items():
            assert float(result.metrics[key][pair]) == float(values[pair])


def test_the_betas_of_pairs_by_hand():
    """Log-ratios (2, -5) with beta 0.05: d = 0.35; (-1, 1.5) with the run's 0.2: d = -0.5."""
    inputs = three_pairs(betas=float64([0.05, float("nan"), 0.7]))
    result = outputs(inputs, loss_type="sigmoid", beta=B, pair_beta=True)
    expected = [softplus(-0.35), softplus(0.5), math.log(2)]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-12)
    expected = [(2 / 4 + 5 / 5 - 10) ** 2, (-1 / 20 - 1.5 / 8 - 2.5) ** 2, (1 / 1.4) ** 2]
    result = outputs(inputs, loss_type="ipo", beta=B, pair_beta=True)
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_where_a_pairs_own_beta_has_a_place():
    assert "betas" in objective(pair_beta=True).columns
    assert "betas" not in objective().columns
    own = objective(loss_type="ipo", pair_beta=True)
    assert own.first_value is None and own.first_formula.endswith("with the pairs' own values")
    assert objective(loss_type=["sigmoid", "sft"], pair_beta=True).columns
    for loss_type in ("plackett_luce", "sft", "bradley_terry"):
        with pytest.raises(InputError, match="loss.pair_beta = True: .* does not use it"):
            objective(loss_type=loss_type, pair_beta=True)


FREE = {
    "sft": (
        {},
        lambda c, r, n, m: -c,
    ),
    "sft, by response": ({"sft_average": "response"}, lambda c, r, n, m: -c / n),
    "cpo": (
        {"beta": B, "label_smoothing": 0.1},
        lambda c, r, n, m: smooth(B * (c - r), 0.1),
    ),
    "simpo": (
        {"beta": 2.0, "simpo_gamma": 0.75, "label_smoothing": 0.1},
        lambda c, r, n, m: smooth(2.0 * (c / n - r / m) - 0.75, 0.1),
    ),
    "simpo, alpha": (
        {"beta": 2.0, "alpha": 0.25},
        lambda c, r, n, m: softplus(
            0.5 - 2.0 * ((1 - math.exp(-c / n / 4)) - (1 - math.exp(-r / m / 4))) * 4
        ),
    ),
    "orpo": (
        {"beta": B},
        lambda c, r, n, m: B * softplus(-math.log(odds(c / n) / odds(r / m))),
    ),
}


@pytest.mark.parametrize("case", FREE)
def test_losses_without_a_reference(case):
    options, expected = FREE[case]
    result = outputs(three_pairs(ref_logps=None), loss_type=case.split(",")[0], **options)
    sides = [(c, r, n, m) for c, r, _, _, n, m in PAIRS]
    assert result.losses.tolist() == pytest.approx([expected(*x) for x in sides], rel=1e-12)
    by_token = case.split(",")[0] in ("simpo", "orpo")  # -30 / 20 is above -12.5 / 8
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, float(by_token), 0.5]


def test_the_mean_over_tokens_is_over_those_of_the_step():
    loss, sums = objective(loss_type="sft").loss(three_pairs())
    assert float(loss) == pytest.approx(46.0 / 27, rel=1e-14)
    assert sums["nll_loss"].tolist() == pytest.approx([46.0, 27.0])
    by_response, _ = objective(loss_type="sft", sft_average="response").loss(three_pairs())
    assert float(by_response) == pytest.approx((10 / 4 + 30 / 20 + 6 / 3) / 3, rel=1e-14)


@pytest.mark.parametrize(("name", "weight"), [("cpo", 0.5), ("orpo", 1.0)])
def test_what_an_objective_adds(name, weight):
    """The preference term's mean over pairs, and the likelihood's over tokens."""
    options = {"loss_type": name, "beta": B, **({"cpo_alpha": 0.5} if name == "cpo" else {})}
    loss, sums = objective(**options).loss(three_pairs())
    term = outputs(three_pairs(), **options).losses.mean()
    assert float(loss) == pytest.approx(float(term) + weight * 46.0 / 27, rel=1e-13)
    assert sums["nll_loss"].tolist() == pytest.approx([46.0, 27.0])
    mean = (sums["rewards/chosen"][0] / sums["rewards/chosen"][1]).item()
    divisors = (4, 20, 3) if name == "orpo" else (1, 1, 1)
    logps = [pair[0] / n for pair, n in zip(PAIRS, divisors, strict=True)]
    assert mean == pytest.approx(B * sum(logps) / 3)
    assert ("log_odds_ratio" in sums) == (name == "orpo")


def test_a_list_is_a_weighted_sum_of_means_over_different_units():
    """MPO: 0.8, 0.2 and 1.0 of three losses; each member is logged without its weight."""
    names = ["sigmoid", "bco_pair", "sft"]
    weights = float64([1.0, 2.0, 0.5])
    inputs = three_pairs(pair_weights=weights)
    own = objective(loss_type=names, loss_weights=[0.8, 0.2, 1.0], beta=B)
    loss, sums = own.loss(inputs)
    means = [(weights * m.outputs(inputs).losses).sum() / weights.sum() for m in own.members[:2]]
    sft = (10 + 2 * 30 + 0.5 * 6) / (4 + 2 * 20 + 0.5 * 3)
    assert float(loss) == pytest.approx(float(0.8 * means[0] + 0.2 * means[1]) + sft, rel=1e-13)
    for name, mean in zip(names, [*means, sft], strict=True):
        total, count = sums[f"loss/{name}"].tolist()
        assert total / count == pytest.approx(float(mean), rel=1e-13)
    assert sums["rewards/chosen"][0] == pytest.approx(0.2)  # those of sigmoid, not of sft


def test_a_margin_is_asked_for_in_units_of_reward():
    result = outputs(three_pairs(), beta=B, margin=True)
    expected = [softplus(-1.4 + 0.5), softplus(0.5), softplus(1.0)]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert result.metrics["rewards/margins"].tolist() == pytest.approx([1.4, -0.5, 0.0])


def test_the_penalty_of_dpop_is_for_a_chosen_response_below_the_reference():
    """Of log-ratios 2, -1 and 0 only the second is penalised: by 5 x 1."""
    result = outputs(three_pairs(), beta=B, dpop_lambda=5.0)
    expected = [softplus(-1.4), softplus(0.5 + B * 5.0), math.log(2)]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"])
def test_losses_of_the_gap_of_scores(name):
    """Gaps 0.75, 0.5 and 0 times 2."""
    result = outputs(three_pairs(), loss_type=name, beta=B, reward_scale=2.0)
    expected = []
    for d, gap in ((1.4, 1.5), (-0.5, 1.0), (0.0, 0.0)):
        p, q = sigmoid(gap), sigmoid(d)
        sides = {"rpo_bwd_kl": kl(p, q), "rpo_fwd_kl": kl(q, p), "rpo_sq": (d - gap) ** 2}
        expected.append(sides[name])
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-14)


class TestDivergences:
    U = float64([-3.0, -0.5, 0.0, 0.25, 2.0])

    @pytest.mark.parametrize(
        ("kind", "alpha", "expected"),
        [
            ("reverse_kl", 0.5, lambda u: u),
            ("forward_kl", 0.5, lambda u: 1 - math.exp(-u)),
            ("js_divergence", 0.5, lambda u: math.log(2 * math.exp(u) / (1 + math.exp(u)))),
            ("alpha_divergence", 0.5, lambda u: (math.exp(-0.5 * u) - 1) / -0.5),
            ("alpha_divergence", 2.0, lambda u: math.exp(u) - 1),
            ("alpha_divergence", 1.0, lambda u: u),
            ("alpha_divergence", 0.0, lambda u: 1 - math.exp(-u)),
        ],
    )
    def test_by_hand(self, kind, alpha, expected):
        result = divergence_scores(self.U, kind, alpha)
        assert result.tolist() == pytest.approx([expected(u) for u in self.U.tolist()], abs=1e-14)

    @pytest.mark.parametrize("kind", ["forward_kl", "alpha_divergence", "js_divergence"])
    def test_far_log_ratios_stay_finite(self, kind):
        u = float64([-1e4, 1e4]).requires_grad_()
        result = divergence_scores(u, kind, 3.0)
        result.sum().backward()
        assert result.isfinite().all() and u.grad.isfinite().all()

    def test_rewards_are_those_of_the_log_ratio(self):
        """Whatever the divergence, as in TRL."""
        result = outputs(three_pairs(), beta=B, f_divergence_type="forward_kl")
        assert result.metrics["rewards/chosen"].tolist() == pytest.approx([0.4, -0.2, 0.0])


@pytest.mark.parametrize("name", [*(x.split(",")[0] for x in BY_HAND), "cpo", "simpo", "orpo"])
def test_far_responses_stay_finite(name):
    scores = float64([-1.0, -9000.0, -9000.0, -1.0, -1e-12, -50.0]).requires_grad_()
    loss, _ = objective(loss_type=name, beta=1.0).loss(three_pairs(scores=scores))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()
