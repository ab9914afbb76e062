"""Bundles -> rows: the trees of a row's bundles with the weights of their pairs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_prefix.data.steps.collate import (
    MicroBatch,
    RowItem,
    Targets,
    collate_packed,
    tree_targets,
)
from megatron_prefix.data.steps.sharing import Bundle, bundles_of, view
from megatron_prefix.data.store import PreferenceDataset


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
    r0 = int(dataset.group_responses[group])
    sets = np.asarray(dataset.response_sets[r0 + dataset.pair_responses[p0:p1, 0]])
    return weights / np.bincount(sets, weights)[sets]


def row_items(
    dataset: PreferenceDataset, bundles: Iterable[Bundle], sharing: str, weighting: str
) -> list[RowItem]:
    """The items of a row for `collate_packed` or `collate_padded`."""
    items = []
    for bundle in bundles:
        part = view(dataset[bundle.group], sharing, bundle.item)
        weights = loss_weights(dataset, bundle.group, weighting)[part.pairs]
        items.append(RowItem(group=bundle.group, view=part, pair_weights=weights))
    return items


def group_rows(
    dataset: PreferenceDataset, group: int, sharing: str = "tree", targets: Targets = tree_targets
) -> list[MicroBatch]:
    """A group without packing: each of its bundles as a row of its own, without padding."""
    bundles = bundles_of(dataset, group, sharing)
    return [
        collate_packed(row_items(dataset, [bundle], sharing, "pair"), 1, targets)
        for bundle in bundles
    ]
