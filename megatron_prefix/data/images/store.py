"""The images of a data set on disk: encoded bytes one after another, and columns about them.

    PREFIX.images                 the bytes as they came; the same bytes once
    PREFIX.tree/image_*.npy       one entry per image: where its bytes are, what they are
    PREFIX.tree/occurrence_*.npy  one entry per place in the tokens at which an image begins

Two images may be the same bytes: LLaVA-OneVision scales the only image of a prompt otherwise than
one among several, so the two have other tokens. Shapes: I images, O occurrences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_prefix.data.images.decoding import decode
from megatron_prefix.data.images.pictures import StoredPicture
from megatron_prefix.data.images.processor import ImageProcessor
from megatron_prefix.data.tree_images import TreeImages
from megatron_prefix.errors import InputError

REMEDY = "build the data set again"


class ImageColumn(NamedTuple):
    """A column about images or occurrences: type, and shape of an entry."""

    dtype: np.dtype
    tail: tuple[int, ...] = ()


IMAGE_COLUMNS: dict[str, ImageColumn] = {
    "image_spans": ImageColumn(np.dtype("<i8"), (2,)),
    "image_hashes": ImageColumn(np.dtype("u1"), (32,)),
    "image_sizes": ImageColumn(np.dtype("<i4"), (2,)),
    "image_tokens": ImageColumn(np.dtype("<i4")),
    "image_grids": ImageColumn(np.dtype("<i4"), (3,)),
    "image_several": ImageColumn(np.dtype("<i4")),
    "occurrence_tokens": ImageColumn(np.dtype("<i8")),
    "occurrence_images": ImageColumn(np.dtype("<i8")),
}


class ImageStore:
    """The images of one data set, by their numbers; `len` counts them.

    `num_tokens` [I] are their placeholder tokens, `grids` [I, 3] their time, height and width in
    tokens (zeros if positions have one axis), `sizes` [I, 2] width and height in pixels, `several`
    [I] whether it is treated as one of several. `occurrence_tokens` [O] are the tokens of the data
    set at which an image begins, ascending, and `occurrence_images` [O] which image that is.
    """

    FILES = (".images", *(f".tree/{name}.npy" for name in IMAGE_COLUMNS))
    """The files that a data set with images has besides the others."""

    def __init__(self, prefix: Path, described: Mapping[str, Any]) -> None:
        self.prefix, self.described = prefix, dict(described)
        counts = {"image": described["images"], "occurrence": described["occurrences"]}
        columns = {}
        for name, about in IMAGE_COLUMNS.items():
            path = Path(f"{prefix}.tree/{name}.npy")
            shape = (counts[name.split("_")[0]], *about.tail)
            columns[name] = _mapped(path, about.dtype, shape)
        self.spans, self.hashes = columns["image_spans"], columns["image_hashes"]
        self.sizes, self.grids = columns["image_sizes"], columns["image_grids"]
        self.num_tokens = columns["image_tokens"]
        self.several = columns["image_several"]
        self.occurrence_tokens = columns["occurrence_tokens"]
        self.occurrence_images = columns["occurrence_images"]
        self._bytes = np.memmap(Path(f"{prefix}.images"), np.uint8, "r")
        if len(self._bytes) != described["bytes"]:
            raise InputError(
                f"{prefix}.images has {len(self._bytes)} bytes, and its manifest asks for "
                f"{described['bytes']}: {REMEDY}"
            )

    def __len__(self) -> int:
        return len(self.num_tokens)

    def within(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The occurrences in tokens `start` to `stop` of the data set: the tokens at which they
        begin, from `start` on, and their images; int64."""
        first, last = np.searchsorted(self.occurrence_tokens, (start, stop))
        starts = np.array(self.occurrence_tokens[first:last], np.int64) - start
        return starts, np.array(self.occurrence_images[first:last], np.int64)

    def in_tree(self, start: int, stop: int) -> TreeImages:
        """The occurrences of a tree whose tokens are `start` to `stop` of the data set."""
        starts, ids = self.within(start, stop)
        return TreeImages(
            starts=starts,
            lengths=np.array(self.num_tokens[ids], np.int64),
            ids=ids,
            grids=np.array(self.grids[ids], np.int64),
        )

    @property
    def processor(self) -> dict[str, Any]:
        """The image processor that the images were counted with, see `ImageProcessor.describe`."""
        return self.described["processor"]

    def bytes(self, image: int) -> bytes:
        """The encoded bytes of an image, as the record had them."""
        start, stop = self.spans[image].tolist()
        return self._bytes[start:stop].tobytes()

    def picture(self, image: int) -> Any:
        """An image as an upright RGB PIL.Image."""
        return decode(self.bytes(image), f"image {image} of {self.prefix}")

    def stored(self, image: int) -> StoredPicture:
        """An image as a writer of another data set takes it."""
        time, height, width = self.grids[image].tolist()
        return StoredPicture(
            sha256=self.hashes[image].tobytes(),
            width=int(self.sizes[image, 0]),
            height=int(self.sizes[image, 1]),
            num_tokens=int(self.num_tokens[image]),
            grid=(time, height, width),
            among_several=bool(self.several[image]),
            source=(self, int(image)),
        )

    def batches(
        self, processor: ImageProcessor, images: Sequence[int]
    ) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Pixels of some images, in batches that the family's model takes: (places in `images`,
        what the image processor returns). One batch, or two if some images are one of several."""
        several = np.asarray(self.several)[np.asarray(images, np.int64)] != 0
        batches = []
        for among_several in (False, True):
            places = np.flatnonzero(several == among_several)
            if len(places):
                pictures = [self.picture(int(images[place])) for place in places.tolist()]
                batches.append((places, processor.pixels(pictures, among_several)))
        return batches

    def __reduce__(self) -> tuple[Callable[..., ImageStore], tuple[Path, dict[str, Any]]]:
        return ImageStore, (self.prefix, self.described)


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{path} cannot be read ({error}): {REMEDY}") from error
    if values.shape != shape or values.dtype != dtype or not values.flags.c_contiguous:
        raise InputError(
            f"{path} is {values.dtype} {values.shape}, and {dtype} {shape} in its manifest: "
            f"{REMEDY}"
        )
    return values
