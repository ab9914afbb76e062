"""Pictures -> the image files of a data set: each encoded picture is written once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.files import ColumnWriter
from megatron_prefix.data.images.pictures import StoredPicture
from megatron_prefix.data.images.store import IMAGE_COLUMNS
from megatron_prefix.errors import InputError


class ImageWriter:
    """Writes `images` and the image columns into the work folder of a data set.

    Images are numbered in the order in which they first occur, so the files depend on the records
    alone. `processor` describes the image processor that counted them.
    """

    def __init__(self, work: Path, processor: Mapping[str, Any]) -> None:
        self._processor = dict(processor)
        self._file = (work / "images").open("wb")
        self._columns = {
            name: ColumnWriter(work / "tree" / f"{name}.npy", about.dtype, about.tail)
            for name, about in IMAGE_COLUMNS.items()
        }
        self._ids: dict[tuple[bytes, bool], int] = {}
        self._spans: dict[bytes, tuple[int, int]] = {}
        self._size = self._occurrences = self._tokens = 0

    def add(
        self,
        pictures: Sequence[StoredPicture],
        ids_O: np.ndarray,
        starts_O: np.ndarray,
        processor: Mapping[str, Any],
    ) -> None:
        """Append occurrences: `ids_O` are places in `pictures`, `starts_O` tokens of the data set.

        Raises InputError if they were counted with another image processor.
        """
        if processor["fingerprint"] != self._processor["fingerprint"]:
            raise InputError(
                "images were counted with two image processors "
                f"({self._processor['fingerprint'][:12]}… and {processor['fingerprint'][:12]}…): "
                "build all parts with one"
            )
        numbers = {int(place): self._number(pictures[place]) for place in dict.fromkeys(ids_O)}
        self._columns["occurrence_tokens"].write(starts_O)
        self._columns["occurrence_images"].write([numbers[int(place)] for place in ids_O])
        self._occurrences += len(ids_O)
        self._tokens += sum(pictures[place].num_tokens for place in ids_O)

    def _number(self, picture: StoredPicture) -> int:
        key = picture.sha256, picture.among_several
        if key not in self._ids:
            if picture.sha256 not in self._spans:
                content = picture.read()
                self._file.write(content)
                self._spans[picture.sha256] = self._size, self._size + len(content)
                self._size += len(content)
            self._columns["image_spans"].write(self._spans[picture.sha256])
            self._columns["image_hashes"].write(np.frombuffer(picture.sha256, np.uint8))
            self._columns["image_sizes"].write((picture.width, picture.height))
            self._columns["image_tokens"].write([picture.num_tokens])
            self._columns["image_grids"].write(picture.grid)
            self._columns["image_several"].write([int(picture.among_several)])
            self._ids[key] = len(self._ids)
        return self._ids[key]

    def finish(self) -> dict[str, Any]:
        """Close the files; returns the manifest's entry `images`."""
        self._file.close()
        for column in self._columns.values():
            column.close()
        return {
            "images": len(self._ids),
            "occurrences": self._occurrences,
            "tokens": self._tokens,
            "bytes": self._size,
            "processor": self._processor,
        }

    def close(self) -> None:
        """Close what is open, of a data set that is given up."""
        files: list[Any] = [self._file, *self._columns.values()]
        for file in files:
            with contextlib.suppress(OSError):
                file.close()
