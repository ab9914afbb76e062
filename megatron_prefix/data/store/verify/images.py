"""Checks of the images of a data set: columns when it is opened, tokens and bytes by `--verify`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from megatron_prefix.data.images import ImageStore
from megatron_prefix.data.store.mapped import MappedFiles
from megatron_prefix.errors import InputError

REMEDY = "build the data set again"
CHUNK = 1 << 20


def check_images(dataset: MappedFiles) -> None:
    """Check that the columns about images agree with each other and with the nodes. Raises
    InputError with the column."""
    store = dataset.images
    if store is None:
        return
    for column, problem in (*_image_problems(store), *_occurrence_problems(dataset, store)):
        raise InputError(f"{dataset.prefix}.tree/{column}.npy: {problem}: {REMEDY}")


def verify_images(dataset: MappedFiles) -> None:
    """Check that images are where their placeholders are, and that each has its own bytes. Raises
    InputError."""
    store = dataset.images
    if store is None:
        return
    for image in range(len(store)):
        if hashlib.sha256(store.bytes(image)).digest() != store.hashes[image].tobytes():
            raise InputError(f"{dataset.prefix}.images: image {image} has other bytes: {REMEDY}")
    token = store.processor["image_token_id"]
    starts, lengths = store.occurrence_tokens, store.num_tokens[store.occurrence_images]
    ends = np.cumsum(lengths, dtype=np.int64)
    for first in range(0, len(dataset.tokens), CHUNK):
        last = min(first + CHUNK, len(dataset.tokens))
        is_placeholder = dataset.tokens[first:last] == token
        # The occurrences that reach into the chunk, cut at its ends.
        low = int(np.searchsorted(starts + lengths, first, "right"))
        high = int(np.searchsorted(starts, last))
        expected = np.zeros(last - first + 1, np.int64)
        np.add.at(expected, np.maximum(starts[low:high] - first, 0), 1)
        np.add.at(expected, np.minimum(starts[low:high] + lengths[low:high], last) - first, -1)
        if not np.array_equal(np.cumsum(expected)[:-1] > 0, is_placeholder):
            raise InputError(
                f"{dataset.prefix}.bin: placeholders of images (token {token}) are not where "
                f"images are: {REMEDY}"
            )
    if int(ends[-1]) != store.described["tokens"]:
        raise InputError(f"{dataset.prefix}.json: tokens of images do not add up: {REMEDY}")


def _image_problems(store: ImageStore) -> Iterator[tuple[str, str]]:
    starts, stops = np.asarray(store.spans).T
    if (starts < 0).any() or (stops <= starts).any() or stops.max() != store.described["bytes"]:
        yield "image_spans", "spans are not those of the bytes"
    if (np.asarray(store.sizes) < 1).any():
        yield "image_sizes", "an image has no pixels"
    if (np.asarray(store.num_tokens) < 1).any():
        yield "image_tokens", "an image has no token"
    if not np.isin(store.several, (0, 1)).all():
        yield "image_several", "an entry is neither 0 nor 1"
    grids = np.asarray(store.grids, np.int64)
    has_grid = (grids != 0).any(axis=1)
    is_bad = (grids < 0).any(axis=1) | (grids.max(axis=1) > store.num_tokens)
    if is_bad.any() or (grids.prod(axis=1) != store.num_tokens)[has_grid].any():
        yield "image_grids", "a grid has another number of tokens than its image"


def _occurrence_problems(dataset: MappedFiles, store: ImageStore) -> Iterator[tuple[str, str]]:
    images = np.asarray(store.occurrence_images)
    if (images < 0).any() or (images >= len(store)).any():
        yield "occurrence_images", "an image does not exist"
        return
    if len(np.unique(images)) != len(store):
        yield "occurrence_images", "an image occurs nowhere"
    starts = np.asarray(store.occurrence_tokens)
    ends = starts + np.asarray(store.num_tokens, np.int64)[images]
    is_inside = starts.min() >= 0 and starts.max() < len(dataset.tokens) >= ends.max()
    if not is_inside or (starts[1:] < ends[:-1]).any():
        yield "occurrence_tokens", "images overlap or do not ascend"
        return
    firsts = np.asarray(dataset.node_pointers) // dataset.tokens.itemsize
    nodes = (np.searchsorted(firsts, tokens, "right") for tokens in (starts, ends - 1))
    if np.not_equal(*nodes).any():
        yield "occurrence_tokens", "an image is cut by a node's end"
