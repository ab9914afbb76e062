"""Accuracies by kind of pair, by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from loss_tables import table

from megatron_prefix.train.accuracies import accuracies_of_kinds


def inputs(chosen: list[int], rejected: list[int], margins: list[float]):
    """Pairs of responses of these lengths."""
    num = len(chosen)
    return replace(
        table(),
        num_tokens=torch.tensor([*chosen, *rejected]),
        pairs=torch.arange(2 * num).reshape(2, num).T,
        margins=torch.tensor(margins, dtype=torch.float64),
    )


def test_by_length_and_by_margin():
    """Lengths that differ by a tenth of the longer one are similar."""
    own = inputs([20, 20, 10, 10], [10, 18, 9, 30], [1.0, 1.0, 2.0, 5.0])
    accuracies = torch.tensor([1.0, 0.0, 0.5, 1.0])
    assert accuracies_of_kinds(own, accuracies) == {
        "rewards/accuracies/chosen_longer": 1.0,
        "rewards/accuracies/similar_length": 0.25,
        "rewards/accuracies/chosen_shorter": 1.0,
        "rewards/accuracies/low_margin": 0.5,
        "rewards/accuracies/middle_margin": 0.5,
        "rewards/accuracies/high_margin": 1.0,
    }


def test_pairs_without_a_margin_are_in_no_third():
    nan = float("nan")
    own = inputs([20] * 4, [10] * 4, [nan, 3.0, nan, 4.0])
    assert accuracies_of_kinds(own, torch.tensor([0.0, 1.0, 0.0, 0.5])) == {
        "rewards/accuracies/chosen_longer": 0.375,
        "rewards/accuracies/low_margin": 1.0,
        "rewards/accuracies/high_margin": 0.5,
    }
    without = inputs([20] * 4, [10] * 4, [nan] * 4)
    assert list(accuracies_of_kinds(without, torch.ones(4))) == ["rewards/accuracies/chosen_longer"]


def test_no_pairs():
    assert accuracies_of_kinds(inputs([], [], []), torch.zeros(0)) == {}
