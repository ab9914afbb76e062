"""The images of a chunk of records: read, decoded once, counted, and numbered for its paths.

Records refer to pictures by path or by bytes. In a chunk, the same bytes get the same number, so
paths of one record share them. Bytes of files are not kept: the writer reads a file again when it
appends it, and finds out if it has changed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_prefix.data.images import Picture, PictureTable, StoredPicture
from megatron_prefix.data.tokenize import Tokenizer
from megatron_prefix.data.tree_images import Placed

MOST = 1 << 16
"""Pictures that are remembered from chunk to chunk, so that they are not decoded again."""


class ChunkImages:
    """The pictures of the current chunk, in the order in which they first occur."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[bytes | Path, bool], StoredPicture] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a chunk without pictures."""
        self._pictures: list[StoredPicture] = []
        self._numbers: dict[tuple[bytes, bool], int] = {}
        if len(self._known) > MOST:
            self._known.clear()

    def place(self, pictures: Sequence[Picture], folder: Path) -> tuple[Placed, ...]:
        """The images of one prompt, in order; paths count from `folder`. Raises InputError if one
        cannot be read or decoded."""
        if not pictures:
            return ()
        processor = self._tokenizer.image_processor()
        several = processor.depends_on_number and len(pictures) > 1
        return tuple(self._placed(self._measured(p, folder, several)) for p in pictures)

    def hashes(self, images: Sequence[Placed]) -> tuple[str, ...]:
        """SHA-256 of the bytes of some images, in hexadecimal."""
        return tuple(self._pictures[image.image].sha256.hex() for image in images)

    def table(self) -> PictureTable | None:
        """The pictures by their numbers; None if the chunk has none."""
        if not self._pictures:
            return None
        processor = self._tokenizer.image_processor()
        return PictureTable(processor.image_token_id, self._pictures, processor.describe())

    def _measured(self, picture: Picture, folder: Path, several: bool) -> StoredPicture:
        source: bytes | Path
        if picture.content is None:
            source = picture.file(folder)
            key: tuple[bytes | Path, bool] = source, several
            name = f"image {source}"
        else:
            source = picture.content
            key, name = (hashlib.sha256(source).digest(), several), "an image of the record"
        if key not in self._known:
            measured = StoredPicture.measured(
                picture.read(folder), source, name, self._tokenizer.image_processor(), several
            )
            self._known[key] = replace(measured, source=Path())
        return replace(self._known[key], source=source)

    def _placed(self, picture: StoredPicture) -> Placed:
        key = picture.sha256, picture.among_several
        if key not in self._numbers:
            self._numbers[key] = len(self._pictures)
            self._pictures.append(picture)
        return Placed(self._numbers[key], picture.num_tokens, picture.grid)
