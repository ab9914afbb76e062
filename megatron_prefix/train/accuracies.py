"""Accuracy of held-out pairs by kind: by the lengths of their sides, and by the data's margin."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.objectives import LossInputs

SIMILAR = 0.1
"""Sides whose lengths differ by at most this share of the longer one have a similar length."""
THIRDS = ("low", "middle", "high")


def accuracies_of_kinds(inputs: LossInputs, accuracies: Tensor) -> dict[str, float]:
    """Means of `accuracies` [P] over pairs of a kind; a kind without pairs is left out.

    A policy that learns length is right where the chosen side is longer and wrong where it is
    shorter. Of the pairs with a margin, the thirds of lowest, middle and highest margin; pairs of
    equal margin are of the same kind, so a third may be larger than another.
    """
    chosen, rejected = inputs.chosen_num_tokens, inputs.rejected_num_tokens
    longer = torch.maximum(chosen, rejected)
    is_similar = (chosen - rejected).abs() <= SIMILAR * longer
    kinds = {
        "chosen_longer": (chosen > rejected) & ~is_similar,
        "similar_length": is_similar,
        "chosen_shorter": (chosen < rejected) & ~is_similar,
    }
    margins = inputs.margins
    if len(margins) and not margins.isnan().all():
        # margins [1 1 2 5 nan], ends of the thirds 1 and 2: thirds [0 0 1 2 -]
        ends = margins.nanquantile(torch.tensor([1 / 3, 2 / 3], dtype=margins.dtype))
        third = torch.bucketize(margins, ends)
        for number, name in enumerate(THIRDS):
            kinds[f"{name}_margin"] = (third == number) & ~margins.isnan()
    return {
        f"rewards/accuracies/{name}": float(accuracies[is_own].mean())
        for name, is_own in kinds.items()
        if is_own.any()
    }
