"""Tokens of unshared training: what a step would run without shared prefixes."""

from __future__ import annotations

import numpy as np

from megatron_prefix.data.store import PreferenceDataset


def logical_tokens(dataset: PreferenceDataset, groups: np.ndarray, is_by_response: bool) -> int:
    """Tokens of unshared training of these groups: both sides of each pair, each with its whole
    prompt, or, `is_by_response`, each response once with its own."""
    if not is_by_response:
        return sum(int(pair_lengths(dataset, int(g)).sum()) for g in groups)
    ends = np.asarray(dataset.group_responses)
    lengths = dataset.response_lengths
    return sum(int(lengths[ends[g] : ends[g + 1]].sum(dtype=np.int64)) for g in groups)


def pair_lengths(dataset: PreferenceDataset, group: int) -> np.ndarray:
    """Tokens of both sides of each pair of a group, each with its whole prompt, [pairs, 2]."""
    p0, p1 = (int(x) for x in dataset.group_pairs[group : group + 2])
    first = int(dataset.group_responses[group])
    return np.asarray(dataset.response_lengths)[dataset.pair_responses[p0:p1] + first]
