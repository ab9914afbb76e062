"""PREFIX.bin and PREFIX.idx in Megatron-Core's indexed format, written front to back.

    .idx   magic, version, type, M, G + 1 | node lengths int32 [M] | pointers int64 [M] | first
           node of each group, and M, int64 [G + 1]

Megatron-Core's own builder keeps every length in a Python list. Here a file next to the tokens
takes the lengths while the data set grows. The index is made from it at the end, so memory does not
grow with the number of nodes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

MAGIC = b"MMIDIDX\x00\x00"
HEADER = 34  # magic 9, version 8, dtype 1, number of sequences 8, of documents 8
DTYPES = {4: np.int32, 8: np.uint16}
CHUNK = 1 << 15
"""Node lengths that become pointers at a time."""


class IndexedWriter:
    """Appends token runs to `folder`/bin; `finish` makes `folder`/idx."""

    def __init__(self, folder: Path, dtype: DTypeLike) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._tokens = (folder / "bin").open("wb")
        self._lengths = (folder / "lengths").open("wb")
        self._num_nodes = 0

    def write(self, tokens: np.ndarray, node_lengths: np.ndarray) -> None:
        """Append runs of `node_lengths` tokens; ids must fit the type."""
        self._tokens.write(np.ascontiguousarray(tokens, self._dtype).data)
        self._lengths.write(np.ascontiguousarray(node_lengths, "<i4").data)
        self._num_nodes += len(node_lengths)

    def finish(self, group_nodes: Path) -> None:
        """Write the index; `group_nodes` is the file of that column, "<i8" [G + 1]."""
        documents = np.load(group_nodes, mmap_mode="r")
        self.close()
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        lengths = self._folder / "lengths"
        with (self._folder / "idx").open("wb") as index:
            index.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]))
            index.write(self._num_nodes.to_bytes(8, "little"))
            index.write(len(documents).to_bytes(8, "little"))
            with lengths.open("rb") as file:
                shutil.copyfileobj(file, index, 1 << 20)
            end = 0
            with lengths.open("rb") as file:
                while len(chunk := np.fromfile(file, "<i4", CHUNK)):
                    # After 9 tokens of 2 bytes, lengths [3 2]: ends [12 14], pointers [18 24]
                    ends = end + np.cumsum(chunk, dtype=np.int64)
                    index.write(((ends - chunk) * self._dtype.itemsize).astype("<i8").data)
                    end = int(ends[-1])
            with group_nodes.open("rb") as file:
                file.seek(documents.offset)
                shutil.copyfileobj(file, index, 1 << 20)
        lengths.unlink()

    def close(self) -> None:
        self._tokens.close()
        self._lengths.close()
