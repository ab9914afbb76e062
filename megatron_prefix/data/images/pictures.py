"""A picture on its way: as a record refers to it, and as a data set keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_prefix.data.images.decoding import decode
from megatron_prefix.data.images.processor import ImageProcessor
from megatron_prefix.errors import InputError

IMAGE = "\U0001fffe"
"""The place of an image inside a text: a character that Unicode keeps free for programs."""


@dataclass(frozen=True)
class Picture:
    """What a record says of an image: its encoded bytes, or the path of a file."""

    content: bytes | None = None
    path: str = ""

    def file(self, folder: Path) -> Path:
        """The file, by a path that counts from `folder`."""
        return folder / self.path

    def read(self, folder: Path) -> bytes:
        """The encoded bytes. Raises InputError if the file cannot be read."""
        if self.content is not None:
            return self.content
        try:
            path = self.file(folder)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError("it is no file")  # reading a pipe or a device may never end
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"image {self.file(folder)} cannot be read ({reason}): paths count from the folder "
                "of the input file; correct the path, or remove the record"
            ) from error


class Bytes(Protocol):
    """Where the encoded bytes of pictures are kept: an ImageStore."""

    def bytes(self, image: int) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class StoredPicture:
    """A picture as a data set keeps it.

    `width` and `height` are those of the upright picture in pixels, `num_tokens` its placeholder
    tokens, `grid` its time, height and width in tokens if positions have three axes, else zeros.
    `among_several` is true if the family treats it otherwise than the only image of its prompt.
    `source` is its bytes, or where they are read from when they are written.
    """

    sha256: bytes
    width: int
    height: int
    num_tokens: int
    grid: tuple[int, int, int]
    among_several: bool
    source: bytes | Path | tuple[Bytes, int]

    @classmethod
    def measured(
        cls,
        content: bytes,
        source: bytes | Path,
        name: str,
        processor: ImageProcessor,
        among_several: bool,
    ) -> StoredPicture:
        """A picture that was decoded once to see that it can be. Raises InputError with `name`."""
        width, height = decode(content, name).size
        count = processor.tokens_of(width, height, among_several)
        return cls(
            sha256=hashlib.sha256(content).digest(),
            width=width,
            height=height,
            num_tokens=count.num_tokens,
            grid=count.grid,
            among_several=among_several,
            source=source,
        )

    def read(self) -> bytes:
        """The encoded bytes. Raises InputError if they are no longer those that were measured."""
        if isinstance(self.source, bytes):
            return self.source
        if isinstance(self.source, tuple):
            store, image = self.source
            return store.bytes(image)
        content = Picture(path=str(self.source)).read(Path())
        if hashlib.sha256(content).digest() != self.sha256:
            raise InputError(
                f"image {self.source} changed while the data set was built: build again"
            )
        return content


class PictureTable(NamedTuple):
    """The pictures of bare paths: -1 - place in their tokens is `pictures[place]`; `placeholder` is
    the token that is stored."""

    placeholder: int
    pictures: Sequence[StoredPicture]
    processor: Mapping[str, Any]
