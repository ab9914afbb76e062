"""The choice of experts by groups, by hand, and the precision of its correction."""

from __future__ import annotations

import torch

from megatron_prefix.config.parts import Routing
from megatron_prefix.model.layers.routing import choose_experts, scores_of

SCORES = torch.tensor([[0.9, 0.1, 0.6, 0.5]])


def routing(score: str, **settings) -> Routing:
    return Routing(score=score, **settings)  # type: ignore[arg-type]


def test_the_docstrings_example():
    two = routing("sigmoid", groups=2)
    weights, chosen = choose_experts(SCORES, 1, two)
    assert chosen.tolist() == [[False, False, True, False]]
    assert weights.tolist() == [[0.0, 0.0, SCORES[0, 2].item(), 0.0]]
    # the best expert of a group counts with softmax scores
    _, chosen = choose_experts(SCORES, 1, routing("softmax", groups=2))
    assert chosen.tolist() == [[True, False, False, False]]


def test_the_correction_changes_the_choice_and_not_the_weight():
    correction = torch.tensor([0.0, 1.0, 0.0, 0.0])
    weights, chosen = choose_experts(SCORES, 1, routing("sigmoid"), correction)
    assert chosen.tolist() == [[False, True, False, False]]
    assert weights[0, 1] == SCORES[0, 1]


def test_weights_are_normalised_and_scaled_and_have_gradients():
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    settings = routing("sigmoid", normalised=True, factor=2.5)
    weights, chosen = choose_experts(scores_of(logits, settings), 2, settings)
    own = logits.sigmoid()[:, :2]
    assert chosen.tolist() == [[True, True, False, False]]
    assert torch.allclose(weights[:, :2], 2.5 * own / own.sum(), rtol=1e-12)
    weights[0, 0].backward()
    assert logits.grad[0, :2].abs().min() > 0 and not logits.grad[0, 2:].any()
    plain = routing("softmax", factor=2.5)
    weights, _ = choose_experts(scores_of(logits, plain), 1, plain)
    assert torch.allclose(weights.sum(), 2.5 * logits.softmax(-1).max())


def test_groups_that_the_experts_do_not_fill():
    assert not list(routing("sigmoid", groups=2).faults(4, 2))
    for settings, words in [
        ({"groups": 3}, "4 experts in n_group = 3"),
        ({"chosen_groups": 2}, "4 experts in n_group = 1, of which topk_group = 2"),
        ({"groups": 4}, "num_experts_per_tok = 2 is above the experts of topk_group = 1"),
        ({"groups": 4, "chosen_groups": 2}, "need at least two in each"),
    ]:
        [fault] = routing("sigmoid", **settings).faults(4, 2)
        assert words in fault
