"""Accuracy of held-out pairs by kind: by the lengths of their sides, by the data's margin, and by a
field of their records."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import LossInputs
from megatron_prefix.text import counted

SIMILAR = 0.1
"""Sides whose lengths differ by at most this share of the longer one have a similar length."""
THIRDS = ("low", "middle", "high")


def accuracies_of_subsets(
    names: Sequence[str], accuracies: Tensor | None, objective: str
) -> dict[str, float]:
    """Means of `accuracies` [P] over the pairs of each name, and `subsets`: the mean of these
    means, in which small subsets count as much as large ones."""
    if accuracies is None:
        raise InputError(f"--subsets: {objective} has no accuracy of pairs: leave it out")
    means = {}
    for name in sorted(set(names)):
        is_own = torch.tensor([own == name for own in names], device=accuracies.device)
        means[f"rewards/accuracies/subset/{name}"] = float(accuracies[is_own].mean())
    return means | {"rewards/accuracies/subsets": sum(means.values()) / len(means)}


def read_subsets(path: str, key: str, num_sets: int) -> list[str]:
    """The name of the subset of every record of a file of JSON Lines. Raises InputError."""
    flag = f"--subsets {path}:{key}"
    if num_sets > 1:
        raise InputError(f"{flag} with several data.valid: give one of them as data.valid=PREFIX")
    opened = gzip.open if path.endswith(".gz") else open
    names = []
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                value = json.loads(line).get(key)
                if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
                    raise InputError(
                        f"{flag}, line {number}: {key} is {value!r}, not a name: give every record "
                        "one, or name another key"
                    )
                names.append(str(value))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{flag}: cannot be read ({error}); give JSON Lines") from None
    return names


def subset_of_pairs(dataset: PreferenceDataset, names: Sequence[str]) -> list[str]:
    """The subset of each pair, by the record that its group comes from. Raises InputError if the
    file has too few records."""
    records = np.asarray(dataset.group_records)
    if len(records) and int(records.max()) >= len(names):
        raise InputError(
            f"--subsets has {counted(len(names), 'record')}, and {dataset.prefix} was built from "
            f"record {int(records.max())} (counted from 0): give the file that was built"
        )
    return [names[r] for r in np.repeat(records, np.diff(dataset.group_pairs)).tolist()]


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
