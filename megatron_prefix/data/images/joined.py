"""The images of several data sets as one: those of the first, then those of the second, …"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_prefix.data.images.pictures import StoredPicture
from megatron_prefix.data.images.store import ImageStore
from megatron_prefix.errors import InputError


class JoinedImages(ImageStore):
    """What a model reads of the images of `stores`, one after another; None for a data set without
    images. `firsts` are the numbers at which the images of each begin.

    Raises InputError if two of them were counted with different image processors.
    """

    def __init__(self, stores: Sequence[ImageStore | None]) -> None:
        known = [store for store in stores if store is not None]
        for store in known[1:]:
            ours, theirs = known[0].processor, store.processor
            if ours["fingerprint"] != theirs["fingerprint"]:
                raise InputError(
                    f"the images of {known[0].prefix} and {store.prefix} were counted with two "
                    f"image processors ({ours['fingerprint'][:12]}… of {ours['family']} and "
                    f"{theirs['fingerprint'][:12]}… of {theirs['family']}): build all data sets "
                    "with one"
                )
        self._stores = tuple(stores)
        sizes = [0 if store is None else len(store) for store in stores]
        self.firsts = np.cumsum([0, *sizes])
        self.prefix = known[0].prefix
        self.described: dict[str, Any] = {"processor": known[0].processor}
        self.num_tokens = np.concatenate([store.num_tokens for store in known])
        self.grids = np.concatenate([store.grids for store in known])
        self.sizes = np.concatenate([store.sizes for store in known])
        self.several = np.concatenate([store.several for store in known])

    def _own(self, image: int) -> tuple[ImageStore, int]:
        """The store of an image, and its number there."""
        index = int(np.searchsorted(self.firsts, image, "right")) - 1
        store = self._stores[index]
        assert store is not None, "it has no image"
        return store, int(image) - int(self.firsts[index])

    def bytes(self, image: int) -> bytes:
        store, own = self._own(image)
        return store.bytes(own)

    def picture(self, image: int) -> Any:
        store, own = self._own(image)
        return store.picture(own)

    def stored(self, image: int) -> StoredPicture:
        store, own = self._own(image)
        return store.stored(own)

    def within(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("read the occurrences of the parts of joined data sets")

    def __reduce__(self) -> tuple[type, tuple]:
        return JoinedImages, (self._stores,)
