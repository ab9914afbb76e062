"""Columns of a data set: .npy files that grow while they are written.

A column's header is padded to 128 bytes whatever its length, so the number of entries is put
in at the end and the file is written front to back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

HEADER_BYTES = 128

COLUMNS: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    name: (np.dtype(dtype), (2,) if name == "pair_responses" else ())
    for dtype, names in {
        "<i8": "group_nodes group_responses group_pairs group_records group_num_records",
        "<i4": "node_parents response_first response_last response_lengths response_prompts "
        "response_sets response_ranks pair_responses",
        "<f8": "response_scores pair_weights pair_margins",
    }.items()
    for name in names.split()
}
"""Name -> (dtype, shape of one entry). The first word says what an entry belongs to."""

OFFSETS = ("group_nodes", "group_responses", "group_pairs")
"""Columns that begin with 0 and have an entry more than there are groups."""


class ColumnWriter:
    """Appends entries of one dtype and shape to a .npy file."""

    def __init__(self, path: Path, dtype: np.dtype, tail: tuple[int, ...] = ()) -> None:
        self._file = path.open("wb")
        self._dtype, self._tail, self._length = np.dtype(dtype), tail, 0
        self._file.write(self._header())

    def write(self, values: Any) -> None:
        array = np.ascontiguousarray(values, self._dtype).reshape(-1, *self._tail)
        self._file.write(array.tobytes())
        self._length += len(array)

    def close(self) -> None:
        """Put the final length into the header."""
        if self._file.closed:
            return
        with self._file:
            self._file.seek(0)
            self._file.write(self._header())

    def _header(self) -> bytes:
        shape = (self._length, *self._tail)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
        magic = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
        head = magic + text.encode("ascii").ljust(HEADER_BYTES - len(magic) - 1) + b"\n"
        assert len(head) == HEADER_BYTES, "the header's text must fit its padding"
        return head


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest keeps of a file: its size in bytes and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
