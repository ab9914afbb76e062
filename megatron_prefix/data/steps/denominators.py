"""What the loss of a step is divided by, for losses of every unit, known before the step.

Each is a sum over the step's groups of columns of the data set, so it does not depend on packing,
micro batches or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError


def loss_weights(dataset: PreferenceDataset, group: int, weighting: str) -> np.ndarray:
    """The weight of each pair of a group in the loss, [pairs].

    `pair`: the pair's own weight. `group`: its share of its comparison set, which weighs 1. Pairs
    with weights [1 3 2], the first two of one set: [1 3 2] under `pair`, [0.25 0.75 1] under
    `group`.
    """
    p0, p1 = (int(x) for x in dataset.group_pairs[group : group + 2])
    weights = dataset.pair_weights[p0:p1].astype(np.float64)
    if weighting == "pair":
        return weights
    sets = np.asarray(dataset.response_sets[_chosen_responses(dataset, group)])
    return weights / np.bincount(sets, weights)[sets]


def _chosen_responses(dataset: PreferenceDataset, group: int) -> np.ndarray:
    """The chosen response of each pair of a group, as an index among all, int64 [pairs].

    Raises InputError if a pair names a response that its group does not have.
    """
    p0, p1 = (int(x) for x in dataset.group_pairs[group : group + 2])
    r0, r1 = (int(x) for x in dataset.group_responses[group : group + 2])
    chosen = dataset.pair_responses[p0:p1, 0].astype(np.int64)
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < r1 - r0:
        raise InputError(
            f"{dataset.prefix}: group {group}: a pair has a response that the group does not "
            "have; the data set is damaged: build it again"
        )
    return r0 + chosen


def step_denominators(
    dataset: PreferenceDataset,
    groups: Iterable[int],
    weighting: str,
    with_attributes: bool = False,
) -> dict[str, float]:
    """The denominators of a step of these groups; a group that is there twice counts twice.

    pair      sum of the pairs' weights
    set       number of comparison sets with a pair
    response  number of responses with a score, or `with_attributes` of scores of attributes
    label     number of responses that are labelled desirable or undesirable
    token     tokens of chosen responses, weighted: the sum over pairs of weight times tokens
    """
    totals = dict.fromkeys(("pair", "set", "response", "token", "label"), 0.0)
    for group in groups:
        weights = loss_weights(dataset, int(group), weighting)
        r0, r1 = (int(x) for x in dataset.group_responses[group : group + 2])
        chosen = _chosen_responses(dataset, int(group))
        own = dataset.response_lengths[chosen].astype(np.int64) - dataset.response_prompts[chosen]
        totals["pair"] += float(weights.sum())
        totals["set"] += len(np.unique(dataset.response_sets[chosen]))
        labels = dataset.response_attributes if with_attributes else dataset.response_scores
        totals["response"] += int((~np.isnan(labels[r0:r1])).sum())
        totals["label"] += int((~np.isnan(dataset.desirable[r0:r1])).sum())
        totals["token"] += float((weights * own).sum())
    return totals
