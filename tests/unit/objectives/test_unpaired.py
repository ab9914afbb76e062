"""Losses of labelled responses: numbers worked out by hand, and the functions of TRL."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from loss_tables import float64, objective, outputs, table

B = 0.2
"""beta"""
LOGRATIOS = (2.0, -1.0, 0.0, 3.0)
LABELS = (1.0, 0.0, 1.0, math.nan)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def responses(logratios=LOGRATIOS, labels=LABELS, **columns):
    """Responses without pairs: desirable, undesirable, desirable, and one without a label."""
    count = len(logratios)
    ref = -10 * torch.arange(1, count + 1, dtype=torch.float64)
    inputs = table(
        scores=ref + float64(logratios),
        ref_logps=ref,
        num_tokens=torch.arange(1, count + 1),
        pairs=torch.zeros((0, 2), dtype=torch.int64),
        margins=torch.zeros(0, dtype=torch.float64),
        pair_weights=torch.zeros(0, dtype=torch.float64),
        ranks=torch.full((count,), -1),
        labels=float64(labels),
        desirable=float64(labels),
        members=torch.arange(count)[:, None],
        set_weights=torch.zeros(count, dtype=torch.float64),
        kl=float64(0.5),
    )
    return replace(inputs, **columns)


BY_HAND = {
    "kto": (
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        [1.5 * (1 - sigmoid(B * 1.5)), 0.5 * (1 - sigmoid(B * 1.5)), 1.5 * (1 - sigmoid(-B / 2))],
    ),
    "apo_zero_unpaired": (
        {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        [1.5 * (1 - sigmoid(B * 2)), 0.5 * sigmoid(-B), 1.5 * 0.5],
    ),
    # delta: (0.4 + 3 + 2) / 6
    "bco": ({}, [softplus(0.9 - 0.4), softplus(-0.2 - 0.9), softplus(0.9)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_by_hand(name):
    options, expected = BY_HAND[name]
    inputs = responses(running_rewards=float64([5.4, 6.0]))
    result = outputs(inputs, loss_type=name, beta=B, **options)
    assert result.losses.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    own = objective(loss_type=name, beta=B, **options)
    loss, sums = own.loss(inputs)
    assert float(loss) == pytest.approx(sum(expected) / 3, rel=1e-12)
    logged = own.logged({name: tuple(x.tolist()) for name, x in sums.items()})
    assert logged["rewards/chosen"] == pytest.approx(0.2)
    assert logged["rewards/rejected"] == pytest.approx(-0.2)
    assert logged["rewards/margins"] == pytest.approx(0.4)
    assert (logged["count/desirable"], logged["count/undesirable"]) == (2, 1)
    assert "rewards/accuracies" not in logged
    assert logged["logps/chosen"] == pytest.approx((-8 - 30) / 2)
    assert {"kto": "kl", "bco": "delta"}.get(name, "loss") in {*logged, "loss"}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_step_without_one_of_the_labels(name):
    for label in (0.0, 1.0):
        inputs = responses(labels=(label,) * 4, running_rewards=float64([0.0, 0.0]))
        loss, sums = objective(loss_type=name, beta=B).loss(inputs)
        assert loss.isfinite()
        assert sums["count/desirable"][0] == 4 * label
        logged = objective(loss_type=name).logged({k: tuple(x.tolist()) for k, x in sums.items()})
        assert "rewards/margins" not in logged and all(map(math.isfinite, logged.values()))


def test_weights_do_not_enter_the_denominator():
    plain = objective(loss_type="kto").loss(responses())[0]
    double = objective(loss_type="kto", desirable_weight=2.0, undesirable_weight=2.0)
    assert float(double.loss(responses())[0]) == pytest.approx(2 * float(plain))
    assert double.first_value == 1.0
    assert objective(loss_type="kto", desirable_weight=2.0).first_value is None


def test_the_running_mean_counts_the_step_itself():
    """Rewards 0.4, -0.2 and 0 of this step, 5 of four responses before."""
    own = objective(loss_type="bco", beta=B)
    inputs = own.advanced(responses(running_rewards=float64([5.0, 4.0])))
    assert inputs.running_rewards.tolist() == pytest.approx([5.2, 7.0])
    _, sums = own.loss(inputs)
    assert sums["delta"].tolist() == pytest.approx([5.2 / 7, 1.0])
    assert own.needs_step and own.needs_running and not objective(loss_type="kto").needs_step


def test_delta_and_kl_have_no_gradient():
    for name in ("bco", "kto"):
        own = objective(loss_type=name, beta=B)
        scores = responses().scores.clone().requires_grad_()
        kl = (scores.sum() * 0 + 0.5).to(torch.float64)
        inputs = own.advanced(replace(responses(), scores=scores, kl=kl))
        (slopes,) = torch.autograd.grad(own.loss(inputs)[0], [scores])
        fixed = replace(inputs, kl=kl.detach(), running_rewards=inputs.running_rewards.detach())
        (expected,) = torch.autograd.grad(own.loss(fixed)[0], [scores])
        assert torch.equal(slopes, expected) and slopes[3] == 0 and bool(slopes[:3].all())


def test_both_sides_of_pairs_are_responses():
    """The table of five pairs: six labelled responses, and the pairs' margins are logged."""
    loss, sums = objective(loss_type="kto", beta=B).loss(table())
    assert sums["rewards/accuracies"][1] == 5 and sums["count/desirable"][0] == 3
    assert loss.isfinite()


TRL = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install trl")


def trl_kto(scores, inputs, loss_type: str, kl: float, weights: tuple[float, float]):
    """`KTOTrainer._compute_loss` of the labelled responses, each of one token."""
    from trl import KTOTrainer

    is_labelled = ~inputs.desirable.isnan()
    logps, ref = scores[is_labelled], inputs.ref_logps[is_labelled]
    count = len(logps)
    zeros = torch.zeros((count, 1), dtype=torch.float64)
    outputs = SimpleNamespace(log_probs=logps[:, None], entropy=zeros, mean_logits=zeros)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=B,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: torch.full((count,), kl, dtype=torch.float64),
    )
    tokens = torch.zeros((count, 2), dtype=torch.int64)
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": torch.tensor([[0, 1]] * count),
        "label": inputs.desirable[is_labelled].bool(),
        "ref_logps": ref,
        "ref_KL_logps": torch.zeros(count, dtype=torch.float64),
    }
    return KTOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False), trainer


@TRL
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize(("name", "kl"), [("kto", 0.8), ("kto", -0.3), ("apo_zero_unpaired", 0.0)])
def test_the_functions_of_trl(name, kl, weights):
    options = {"desirable_weight": weights[0], "undesirable_weight": weights[1], "beta": B}
    inputs = replace(table(), kl=float64(max(kl, 0.0)))
    ours = inputs.scores.clone().requires_grad_()
    theirs = inputs.scores.clone().requires_grad_()
    own = objective(loss_type=name, **options)
    loss, sums = own.loss(replace(inputs, scores=ours))
    expected, trainer = trl_kto(theirs, inputs, name, kl, weights)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=0)
    logged = own.logged({name: tuple(x.tolist()) for name, x in sums.items()})
    for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert logged[key] == pytest.approx(trainer._metrics["train"][key][0], rel=1e-6)
