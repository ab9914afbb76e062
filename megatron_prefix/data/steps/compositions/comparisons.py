"""Which pairs of a data set enter the loss: all, or some by the levels of rank in their set.

A set with ranks [0, 1, 1, 2] has three levels. Of its pairs, (0, 1) (0, 2) (0, 3) (1, 3) (2, 3):

    all            all of them
    best_vs_rest   (0, 1) (0, 2) (0, 3)
    best_vs_worst  (0, 3)
    adjacent       (0, 1) (0, 2) (1, 3) (2, 3)
"""

from __future__ import annotations

import copy

import numpy as np

from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.errors import InputError


def with_comparisons(dataset: PreferenceDataset, comparisons: str) -> PreferenceDataset:
    """The data set with those of its pairs that `comparisons` selects.

    Only the columns of pairs differ; groups, responses and fingerprint are the same. Raises
    InputError if a pair has a response without a rank, which has no level.
    """
    if comparisons == "all":
        return dataset
    if len(dataset.parts) > 1:
        return _of_joined(dataset, comparisons)
    firsts = np.asarray(dataset.group_responses, np.int64)
    pairs_of_group = np.diff(dataset.group_pairs)
    group = np.repeat(np.arange(len(dataset)), pairs_of_group)
    sides = np.asarray(dataset.pair_responses, np.int64) + firsts[group][:, None]
    ranks = np.asarray(dataset.response_ranks, np.int64)
    if (unranked := (ranks[sides] < 0).any(axis=1)).any():
        first = int(group[np.argmax(unranked)])
        raise InputError(
            f"{dataset.prefix}: {int(unranked.sum())} of the {len(sides)} pairs have a response "
            f"without a rank (first in group {first}, record {int(dataset.group_records[first])}), "
            f"and loss.comparisons: {comparisons} selects pairs by rank: remove it"
        )
    levels, lowest = _levels(dataset, ranks)
    chosen, rejected = levels[sides].T
    selected = {
        "best_vs_rest": chosen == 0,
        "best_vs_worst": (chosen == 0) & (rejected == lowest[sides[:, 1]]),
        "adjacent": rejected == chosen + 1,
    }[comparisons]
    view = copy.copy(dataset)
    vars(view).pop("desirable", None)  # computed of all pairs
    view.comparisons, view.whole = comparisons, dataset
    view.pair_numbers = np.flatnonzero(selected)
    counts = np.bincount(group[selected], minlength=len(dataset))
    view.group_pairs = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    for name in ("pair_responses", "pair_weights", "pair_margins", "pair_betas"):
        setattr(view, name, np.asarray(getattr(dataset, name))[selected])
    return view


def _of_joined(dataset: PreferenceDataset, comparisons: str) -> PreferenceDataset:
    """Joined data sets: the selection of each, joined."""
    view = join_datasets([with_comparisons(part, comparisons) for part in dataset.parts])
    firsts = np.cumsum([0, *(len(part.pair_weights) for part in dataset.parts[:-1])])
    numbers = [part.pair_numbers for part in view.parts]
    view.comparisons, view.whole = comparisons, dataset
    view.pair_numbers = np.concatenate(
        [own + first for own, first in zip(numbers, firsts, strict=True) if own is not None]
    )
    return view


def _levels(dataset: PreferenceDataset, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level of each response in its comparison set, [R], and the lowest level of its set, [R].

    Ranks [0, 3, 3, 5] of one set: levels [0, 1, 1, 2], lowest [2, 2, 2, 2]. Unranked: -1.
    """
    group = np.repeat(np.arange(len(dataset)), np.diff(dataset.group_responses))
    sets = np.asarray(dataset.response_sets, np.int64)
    keys = group * (int(sets.max(initial=0)) + 1) + sets
    order = np.lexsort((ranks, keys))
    known = order[ranks[order] >= 0]
    starts_set = np.diff(keys[known], prepend=-1) != 0
    is_new = starts_set | (np.diff(ranks[known], prepend=-1) != 0)
    counted = np.cumsum(is_new)
    base = np.maximum.accumulate(np.where(starts_set, counted, 0))
    levels = np.full(len(ranks), -1, np.int64)
    levels[known] = counted - base
    lowest = np.zeros(int(keys.max(initial=0)) + 1, np.int64)
    np.maximum.at(lowest, keys[known], levels[known])
    return levels, lowest[keys]
