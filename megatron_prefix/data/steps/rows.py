"""Bundles -> rows: the trees of a row's bundles with the weights of their pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from megatron_prefix.data.steps.collate import (
    MicroBatch,
    RowItem,
    Targets,
    collate_packed,
    tree_targets,
)
from megatron_prefix.data.steps.denominators import loss_weights
from megatron_prefix.data.steps.parts import Limits
from megatron_prefix.data.steps.row_images import RowImages
from megatron_prefix.data.steps.sharing import NO_LIMITS, Bundle, bundles_of, view
from megatron_prefix.data.store import PreferenceDataset


def row_items(
    dataset: PreferenceDataset, bundles: Iterable[Bundle], sharing: str, weighting: str
) -> list[RowItem]:
    """The items of a row for `collate_packed` or `collate_padded`."""
    items = []
    for bundle in bundles:
        part = view(dataset[bundle.group], sharing, bundle.item, bundle.part)
        weights = loss_weights(dataset, bundle.group, weighting)[part.pairs]
        places = _pair_places(dataset, bundle.group, part.pairs)
        first = int(dataset.group_responses[bundle.group])
        items.append(
            RowItem(
                group=bundle.group,
                view=part,
                pair_weights=weights,
                pair_places=places,
                desirable=dataset.desirable[first + part.responses],
            )
        )
    return items


def _pair_places(dataset: PreferenceDataset, group: int, pairs: np.ndarray) -> np.ndarray | None:
    """The places of a group's pairs among all of its pairs, if some are left out."""
    if dataset.whole is None or dataset.pair_numbers is None:
        return None
    first = int(dataset.whole.group_pairs[group])
    return dataset.pair_numbers[int(dataset.group_pairs[group]) + pairs] - first


def with_row_images(rows: list[MicroBatch], dataset: PreferenceDataset) -> list[MicroBatch]:
    """The rows, with an empty `images` if a row without any is of a data set that has some."""
    if dataset.images is None:
        return rows
    return [replace(row, images=row.images or RowImages.none()) for row in rows]


def group_rows(
    dataset: PreferenceDataset,
    group: int,
    sharing: str = "tree",
    targets: Targets = tree_targets,
    limits: Limits = NO_LIMITS,
) -> list[MicroBatch]:
    """A group without packing: each of its bundles, or part of one that is beyond `limits`, as a
    row of its own, without padding."""
    bundles = bundles_of(dataset, group, sharing, limits)
    return [
        collate_packed(row_items(dataset, [bundle], sharing, "pair"), 1, targets)
        for bundle in bundles
    ]
