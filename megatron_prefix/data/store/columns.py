"""The columns of a data set: their names, types and shapes."""

from __future__ import annotations

import numpy as np

COLUMNS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    name: (np.dtype(dtype), (2,) if name == "pair_responses" else ())
    for dtype, names in {
        "<i8": "group_nodes group_responses group_pairs group_records group_num_records",
        "<i4": "node_parents response_first response_last response_lengths response_prompts "
        "response_sets response_ranks pair_responses",
        "<f8": "response_scores pair_weights pair_margins",
    }.items()
    for name in names.split()
}
"""Name -> (dtype, shape of one entry). The first word says what an entry belongs to."""

OFFSETS = ("group_nodes", "group_responses", "group_pairs")
"""Columns that begin with 0 and have one entry more than there are groups."""
