"""Losses of whole comparison sets by hand, their relations, and the metric top1."""

import math
from itertools import combinations

import pytest
import torch
from loss_tables import float64, objective, outputs, table

from megatron_prefix.objectives.ranking import infonca, lipo_lambda, nca, plackett_luce, top1

S = float64([[0.5, -1.0, 2.0, 0.0], [1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])
RANKS = torch.tensor([[0, 2, 1, 3], [0, 1, -1, -1], [0, 1, 1, -1]])
LABELS = float64([[1.0, 0.25, 0.5, 0.0], [1.0, 0.0, math.nan, math.nan], [0.5, 0.5, 0.0, math.nan]])
"""Three sets of four, two and three responses; the last one has a tie."""


def log_sum(*values):
    return math.log(sum(map(math.exp, values)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_plackett_luce_by_hand():
    expected = [
        (log_sum(0.5, 2.0, -1.0, 0.0) - 0.5)
        + (log_sum(2.0, -1.0, 0.0) - 2.0)
        + (log_sum(-1.0, 0.0) + 1.0),
        math.log1p(math.exp(2.0)),  # a set of two is DPO
        math.log(3.0),  # the two of equal rank are not compared
    ]
    assert plackett_luce(S, RANKS, MASK).tolist() == pytest.approx(expected, rel=1e-13)


def test_unranked_responses_take_no_part():
    ranks = torch.tensor([[0, -1, 1, -1], [-1, -1, -1, -1], [0, 1, -1, -1]])
    expected = [log_sum(0.5, 2.0) - 0.5, 0.0, math.log(2.0)]
    assert plackett_luce(S, ranks, MASK).tolist() == pytest.approx(expected, rel=1e-13)


def softmax(values):
    return [math.exp(x - log_sum(*values)) for x in values]


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_infonca_and_nca_by_hand(temperature):
    for i, size in enumerate((4, 2, 3)):
        s, labels = S[i, :size].tolist(), LABELS[i, :size].tolist()
        targets = softmax([x / temperature for x in labels])
        cross = -sum(p * math.log(q) for p, q in zip(targets, softmax(s), strict=True))
        result = infonca(S, LABELS, MASK, temperature=temperature)[i]
        assert float(result) == pytest.approx(cross, rel=1e-13)
        positive = -sum(p * math.log(sigmoid(x)) for p, x in zip(targets, s, strict=True))
        negative = -sum(math.log(sigmoid(-x)) for x in s) / size
        result = nca(S, LABELS, MASK, temperature=temperature)[i]
        assert float(result) == pytest.approx(positive + negative, rel=1e-13)


def test_lipo_by_hand():
    """Set 0 by its rewards is 2, 0, 3, 1, so tau is [2, 4, 1, 3]; equal rewards are in order."""
    taus = ([2, 4, 1, 3], [2, 1], [1, 2, 3])
    for i, tau in enumerate(taus):
        total = 0.0
        for j, k in combinations(range(len(tau)), 2):
            a, b = (j, k) if LABELS[i, j] > LABELS[i, k] else (k, j)
            if LABELS[i, a] == LABELS[i, b]:
                continue
            gain = abs(2 ** LABELS[i, a].item() - 2 ** LABELS[i, b].item())
            discount = abs(1 / math.log(1 + tau[a]) - 1 / math.log(1 + tau[b]))
            total += gain * discount * math.log1p(math.exp(S[i, b].item() - S[i, a].item()))
        assert float(lipo_lambda(S, LABELS, MASK)[i]) == pytest.approx(total, rel=1e-13)


def test_top1():
    goodness = -RANKS.double()
    assert top1(S, goodness, MASK).tolist() == pytest.approx([0.0, 0.0, 1 / 3])
    assert top1(-S, goodness, MASK).tolist() == pytest.approx([0.0, 1.0, 1 / 3])
    assert top1(S[:1] * 0, goodness[:1], MASK[:1]).tolist() == [0.25]


def test_a_policy_s_rewards_are_beta_times_its_log_ratios():
    inputs = table()
    result = outputs(inputs, loss_type="plackett_luce", beta=0.3)
    s = 0.3 * (inputs.set_scores - inputs.set_ref_logps)
    expected = plackett_luce(s, inputs.set_ranks, inputs.set_mask)
    assert result.losses.tolist() == expected.tolist() and result.losses[2] == 0.0
    model = outputs(inputs, "reward", loss_type="plackett_luce")
    expected = plackett_luce(inputs.set_scores, inputs.set_ranks, inputs.set_mask)
    assert model.losses.tolist() == expected.tolist()


def test_a_set_of_two_is_dpo_and_bradley_terry():
    inputs = table()
    ranking = outputs(inputs, loss_type="plackett_luce").losses[0]
    assert float(ranking) == pytest.approx(float(outputs(inputs).losses[0]), rel=1e-13)
    ranking = outputs(inputs, "reward", loss_type="plackett_luce").losses[0]
    pair = outputs(inputs, "reward", loss_type="bradley_terry").losses[0]
    assert float(ranking) == pytest.approx(float(pair), rel=1e-13)


def test_every_set_weighs_1_and_one_without_a_pair_nothing():
    inputs = table()
    loss, sums = objective(loss_type="nca").loss(inputs)
    losses = outputs(inputs, loss_type="nca").losses
    assert losses[2] > 0.1
    assert float(loss) == pytest.approx(float((losses[0] + losses[1]) / 2), rel=1e-13)
    assert sums["rewards/top1"][1] == 2.0


def test_at_the_start_the_loss_is_of_the_sizes_alone():
    start = table(ref_is_policy=True)
    ranking, _ = objective(loss_type="plackett_luce").loss(start)
    assert float(ranking) == pytest.approx((math.log(2) + math.log(4) + 2 * math.log(2)) / 2)
    contrast, _ = objective(loss_type="infonca").loss(start)
    assert float(contrast) == pytest.approx((math.log(2) + math.log(4)) / 2)
