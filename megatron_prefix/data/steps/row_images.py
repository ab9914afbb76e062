"""The images of a row: where their placeholder tokens are, and which pictures are encoded.

A picture that occurs twice in a group, after different texts, is encoded once. A row of two groups
with the pictures 7 and 9, and 7 again; 7 takes 4 tokens, 9 takes 2:

    row      t 7 7 7 7 t 9 9 t 7 7 7 7 | 7 7 7 7 t
    starts   1 6 9 13     lengths   4 2 4 4     ids   7 9 7 7
    encoded  0 1 0 2      encoded_ids   7 9 7      the second group encodes 7 for itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.data.steps.sharing import View


@dataclass(frozen=True, kw_only=True, eq=False)
class RowImages:
    """Images of one row. int64 arrays of O occurrences, in order of tokens, and E encodings."""

    starts: np.ndarray
    """[O]: the row's token at which an occurrence begins."""
    lengths: np.ndarray
    """[O]: its placeholder tokens, one after another."""
    ids: np.ndarray
    """[O]: the picture in the data set's store."""
    grids: np.ndarray
    """[O, 3]: its time, height and width in tokens, if positions have three axes; else zeros."""
    encoded: np.ndarray
    """[O]: which of the row's encodings it takes."""
    encoded_ids: np.ndarray
    """[E]: the picture of each encoding."""

    @classmethod
    def none(cls) -> RowImages:
        """Of a row without images."""
        nothing = np.zeros(0, np.int64)
        grids = nothing.reshape(0, 3)
        return cls(
            starts=nothing,
            lengths=nothing,
            ids=nothing,
            grids=grids,
            encoded=nothing,
            encoded_ids=nothing,
        )

    @property
    def num_encoded(self) -> int:
        """Pictures that the vision tower encodes for this row."""
        return len(self.encoded_ids)


def row_images(views: Sequence[View], place: np.ndarray) -> RowImages | None:
    """The images of a row of some bundles, whose tokens have the places `place` in it; None if the
    data set has no images.

    A bundle encodes a picture once; if its responses share nothing, each of its roots does.
    """
    if not any(view.tree.images is not None for view in views):
        return None
    starts, lengths, ids, grids, units = [], [], [], [], []
    num_tokens = num_units = 0
    for view in views:
        tree, images = view.tree, view.tree.images
        is_root = (tree.parents < 0).astype(np.int64)
        root_of_token = np.repeat(np.cumsum(is_root) - 1, tree.node_lengths)
        if images is not None:
            starts.append(place[images.starts + num_tokens])
            lengths.append(images.lengths)
            ids.append(images.ids)
            grids.append(images.grids)
            own = root_of_token[images.starts]
            units.append(num_units + (np.zeros_like(own) if view.is_shared else own))
        num_tokens += tree.num_tokens
        num_units += 1 if view.is_shared else int(is_root.sum())
    all_ids = np.concatenate(ids)
    # Encodings are numbered in the order in which they first occur.
    keys = list(zip(np.concatenate(units).tolist(), all_ids.tolist(), strict=True))
    encodings = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return RowImages(
        starts=np.concatenate(starts).astype(np.int64),
        lengths=np.concatenate(lengths),
        ids=all_ids,
        grids=np.concatenate(grids),
        encoded=np.array([encodings[key] for key in keys], np.int64),
        encoded_ids=np.array([image for _, image in encodings], np.int64),
    )
