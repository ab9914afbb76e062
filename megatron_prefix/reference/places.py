"""Where a row's responses and pairs are among those of the whole data set.

Shapes: R responses of a row, P pairs of it.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.store import PreferenceDataset


def response_index(dataset: PreferenceDataset, row: MicroBatch) -> np.ndarray:
    """A row's responses as indices among all of the data set, int64 [R].

    Groups of 2, 3 and 2 responses start at [0, 2, 5]: (group 1, response 2) is number 4.
    """
    groups, responses = row.response_ids[:, 0], row.response_ids[:, 1]
    return np.asarray(dataset.group_responses)[groups] + responses


def stored_index(dataset: PreferenceDataset, row: MicroBatch) -> np.ndarray:
    """A row's responses as indices among all that the data set's files have, int64 [R]."""
    return dataset.stored_numbers(row.response_ids)


def pair_index(dataset: PreferenceDataset, row: MicroBatch) -> np.ndarray:
    """A row's pairs as indices among all of the data set, int64 [P]."""
    whole = dataset.whole or dataset
    return np.asarray(whole.group_pairs)[row.pair_ids[:, 0]] + row.pair_ids[:, 1]
