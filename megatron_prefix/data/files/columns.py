"""Columns: .npy files that grow while they are written, and a check of offsets.

The header of a column is padded to 128 bytes. So the number of entries can be written into it at
the end, and the entries are written front to back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

HEADER_BYTES = 128
CHUNK = 1 << 20
"""Entries that are checked at a time."""


class ColumnWriter:
    """Appends entries of one dtype and shape to a .npy file."""

    def __init__(self, path: Path, dtype: DTypeLike, tail: tuple[int, ...] = ()) -> None:
        self._file = path.open("wb")
        self._dtype, self.tail, self._length = np.dtype(dtype), tail, 0
        self._file.write(self._header())

    def write(self, values: ArrayLike) -> None:
        """Append entries, each of the shape `tail`."""
        array = np.ascontiguousarray(values, self._dtype).reshape(-1, *self.tail)
        self._file.write(array.tobytes())
        self._length += len(array)

    def close(self) -> None:
        """Write the final length into the header."""
        if self._file.closed:
            return
        with self._file:
            self._file.seek(0)
            self._file.write(self._header())

    def _header(self) -> bytes:
        shape = (self._length, *self.tail)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
        magic = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
        head = magic + text.encode("ascii").ljust(HEADER_BYTES - len(magic) - 1) + b"\n"
        assert len(head) == HEADER_BYTES, "the header's text must fit its padding"
        return head


def is_partition(offsets: np.ndarray, total: int, least: int) -> bool:
    """Whether offsets rise from 0 to `total`, each by at least `least`, 0 or 1; read in chunks.

    With total 5 and least 1: [0, 2, 5] is one, [0, 2, 2, 5] is not.
    """
    if offsets[0] != 0 or offsets[-1] != total:
        return False
    rises = np.greater if least else np.greater_equal  # a difference of forged values can overflow
    chunks = (offsets[at : at + CHUNK + 1] for at in range(0, len(offsets) - 1, CHUNK))
    return all(rises(chunk[1:], chunk[:-1]).all() for chunk in chunks)
