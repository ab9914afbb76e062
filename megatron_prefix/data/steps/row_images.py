"""The images of a row: where their placeholder tokens are, and which pictures are encoded.

A picture that occurs twice in a group, behind different texts, is encoded once. A row of two groups
with the pictures 7 and 9, and 7 again; 7 takes 4 tokens, 9 takes 2:

    row      t 7 7 7 7 t 9 9 t 7 7 7 7 | 7 7 7 7 t
    starts   1 6 9 13     lengths   4 2 4 4     ids   7 9 7 7
    encoded  0 1 0 2      encoded_ids   7 9 7      the second group encodes 7 for itself
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class RowImages:
    """Images of one row. int64 arrays of O occurrences, in order of tokens, and E encodings."""

    starts: np.ndarray
    """[O]: the row's token at which an occurrence begins."""
    lengths: np.ndarray
    """[O]: its placeholder tokens, one after another."""
    ids: np.ndarray
    """[O]: the picture in the data set's store."""
    grids: np.ndarray
    """[O, 3]: its time, height and width in tokens, if positions have three axes; else zeros."""
    encoded: np.ndarray
    """[O]: which of the row's encodings it takes."""
    encoded_ids: np.ndarray
    """[E]: the picture of each encoding."""

    @property
    def num_encoded(self) -> int:
        """Pictures that the vision tower encodes for this row."""
        return len(self.encoded_ids)
