"""The images of one row on the device, and the tokens that their features replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class PixelBatch(NamedTuple):
    """Images that the vision part takes in one call."""

    images: tuple[int, ...]
    """Which ones of the row's."""
    pixels: Mapping[str, Tensor]
    """What `get_image_features` takes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPixels:
    """Images of one row, or of this rank's tokens of it.

    Two images of 3 and 2 features, the second of which occurs twice:

        lengths [3, 2]    places [1 2 3 | 5 6 | 9 10]    sources [0 1 2 | 3 4 | 3 4]
    """

    batches: tuple[PixelBatch, ...]
    """Empty on later pipeline stages, which encode no images."""
    lengths: tuple[int, ...]
    """Features of each image."""
    names: tuple[str, ...]
    """What messages call each image."""
    places: Tensor
    """int64 [K]: tokens of this rank, in order, whose embeddings are replaced."""
    sources: Tensor
    """int64 [K]: the feature that each of them takes, of all images one after another."""
