"""The images of a row, made into pixels by the model's image processor.

This is done on the feed's thread, and only on ranks of the first pipeline stage, which encode them.
With context parallelism, a rank encodes the images of which it has tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from megatron.core.parallel_state import is_pipeline_first_stage

from megatron_prefix.data.images import ImageProcessor, ImageStore
from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.model import TreeTransformerConfig
from megatron_prefix.model.vision import PixelBatch, RowPixels
from megatron_prefix.platform import on_device


class PixelSource(Protocol):
    """Where the pixels of pictures come from."""

    def batches(self, images: np.ndarray, device: torch.device) -> tuple[PixelBatch, ...]:
        """The pictures with these numbers, as the model takes them."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a data set, and the processor of the model that reads them."""

    store: ImageStore
    processor: ImageProcessor

    @classmethod
    def of(cls, dataset: PreferenceDataset, config: TreeTransformerConfig) -> Pictures | None:
        """Those that this rank encodes; None if the data set has none, or on later stages."""
        store = dataset.images
        if store is None or not is_pipeline_first_stage(ignore_virtual=True):
            return None
        assert config.vision is not None, "a model that reads images"
        return cls(store, ImageProcessor.open(config.vision.directory))

    def batches(self, images: np.ndarray, device: torch.device) -> tuple[PixelBatch, ...]:
        """The pictures with these numbers, as the model takes them."""
        made = self.store.batches(self.processor, images.tolist())
        return tuple(
            PixelBatch(
                tuple(places.tolist()),
                {name: on_device(values, device) for name, values in pixels.items()},
            )
            for places, pixels in made
        )


def row_pixels(
    batch: MicroBatch, own: np.ndarray, pictures: PixelSource | None, device: torch.device
) -> RowPixels | None:
    """The images of a row of which this rank has tokens, `own` of the row, ascending; None if the
    data set has no images.

    Without `pictures` there are no pixels, and only a later stage can run the row.
    """
    images = batch.images
    if images is None:
        return None
    # Lengths [3, 2] begin at 0 and 3 of all: [0 1 2 3 4] - [0 0 0 3 3] is [0 1 2 0 1].
    ends = np.cumsum(images.lengths)
    within = np.arange(images.lengths.sum()) - np.repeat(ends - images.lengths, images.lengths)
    tokens = np.repeat(images.starts, images.lengths) + within
    encoded = np.repeat(images.encoded, images.lengths)
    is_own = np.isin(tokens, own)
    tokens, within, encoded = tokens[is_own], within[is_own], encoded[is_own]
    # Encodings [0 1 2] of which this rank has tokens of 0 and 2: they become its 0 and 1.
    used, place = np.unique(encoded, return_inverse=True)
    lengths = np.zeros(images.num_encoded, np.int64)
    lengths[images.encoded] = images.lengths
    firsts = np.concatenate([[0], np.cumsum(lengths[used])])[:-1]
    batches: tuple[PixelBatch, ...] = ()
    if pictures is not None and len(used):
        batches = pictures.batches(images.encoded_ids[used], device)
    return RowPixels(
        batches=batches,
        lengths=tuple(lengths[used].tolist()),
        names=tuple(f"image {number} of the data set" for number in images.encoded_ids[used]),
        places=on_device(np.searchsorted(own, tokens), device),
        sources=on_device(firsts[place] + within, device),
    )
