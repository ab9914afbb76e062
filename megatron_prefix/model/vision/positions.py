"""Positions with three axes along root paths: M-RoPE (Wang et al. 2024, arXiv 2409.12191).

A token of text has one position on all axes, after everything before it on its root path. An image
of t x h x w tokens begins at such a position s, and its token (i, j, k) has the position
(s + i, s + j, s + k). What follows begins at s + max(h, w).

A prompt of one token, an image of 1 x 2 x 3 tokens and another token, then two responses:

    tokens   a  0  1  2  3  4  5  b | c d | e
    time     0  1  1  1  1  1  1  4 | 5 6 | 5
    height   0  1  1  1  2  2  2  4 | 5 6 | 5
    width    0  1  2  3  1  2  3  4 | 5 6 | 5

Shapes: T tokens, O images.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.layout import TreeLayout


def axis_positions(
    layout: TreeLayout, starts_O: np.ndarray, lengths_O: np.ndarray, grids_O3: np.ndarray
) -> np.ndarray:
    """int64 [3, T]: the position of each token of a row in time, height and width.

    Images begin at the row's tokens `starts_O`, have `lengths_O` tokens and the grids `grids_O3`:
    tokens in time, height and width. No segment ends within an image.
    """
    # How far each token moves what follows; an image's last token moves it for the whole image.
    steps_T = np.ones(layout.num_tokens, np.int64)
    offsets_3T = np.zeros((3, layout.num_tokens), np.int64)
    for start, length, grid in zip(starts_O, lengths_O, grids_O3, strict=True):
        own = slice(start, start + length)
        steps_T[own] = 0
        steps_T[start + length - 1] = grid[1:].max()
        offsets_3T[:, own] = np.indices(grid).reshape(3, -1)
    # Before each token of the row, minus what is not on its root path.
    before_T = np.concatenate([[0], np.cumsum(steps_T)])
    ends = layout.starts + layout.lengths
    shifts = np.zeros(layout.num_segments, np.int64)
    for segment, parent in enumerate(layout.parents):
        reached = 0 if parent < 0 else before_T[ends[parent]] + shifts[parent]
        shifts[segment] = reached - before_T[layout.starts[segment]]
    positions_T = before_T[:-1] + np.repeat(shifts, layout.lengths)
    return positions_T + offsets_3T
