"""Pieces of a row: runs of queries on one leaf's path, and the keys that each run sees.

A row is cut after every leaf, and at gaps between queries. The keys of a piece are the root path of
its last query. With a sliding window they begin with the first key that the piece's first query
sees; ancestors before it are left out.

    lengths [3, 2, 4], parents [-1, 0, 0]       (prompt, two responses)
    whole row   keys [0 1 2 3 4 | 0 1 2 5 6 7 8]
    window 2    keys [0 1 2 3 4 | 2 5 6 7 8]    token 5, at position 3, sees position 2 and itself

Numpy only.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.layout import TreeLayout


def cut_into_pieces(
    layout: TreeLayout, q_tokens: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Number of queries of each piece, and its last token, int64 [pieces] each. `q_tokens` are the
    queries, ascending token indices; None is all tokens."""
    # lengths [3, 2, 4], parents [-1, 0, 0]:  leaf_ends [5, 9]
    # whole row: lengths [5, 4], last tokens [4, 8]
    # q_tokens [3, 4, 6, 8]:  leaf_of [0, 0, 1, 1];  a piece ends at a gap or with its leaf, so
    # is_last [0, 1, 1, 1], lengths [2, 1, 1], last tokens [4, 6, 8]
    leaf_ends = (layout.starts + layout.lengths)[layout.leaf_mask].astype(np.int64)
    if q_tokens is None:
        return np.diff(leaf_ends, prepend=0), leaf_ends - 1
    leaf_of = np.searchsorted(leaf_ends, q_tokens, side="right")
    is_last = (np.diff(q_tokens, append=-2) != 1) | (np.diff(leaf_of, append=-1) != 0)
    lasts = np.flatnonzero(is_last)
    return np.diff(lasts, prepend=-1), np.asarray(q_tokens, np.int64)[lasts]


def seen_paths(
    layout: TreeLayout, q_lengths: np.ndarray, last_tokens: np.ndarray, window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The keys that each piece sees: their tokens, one piece after another, int64, and the number
    of keys of each piece, int64 [pieces]."""
    if window is None:
        return layout.root_paths(last_tokens)
    # Queries of a piece have consecutive positions: of 4 that end at position 6 the first is at 3
    # and sees, with a window of 2, positions 2 and 3.
    first_positions = layout.positions_of(last_tokens) - q_lengths + 1
    return layout.root_paths(last_tokens, np.maximum(first_positions - window + 1, 0))


def needed_tokens(layout: TreeLayout, tokens: np.ndarray, window: int | None = None) -> np.ndarray:
    """The tokens that `tokens` see, themselves included, ascending, int64: their root paths, or the
    last `window` tokens of each root path."""
    if window is None:
        return _whole_paths(layout, tokens)
    index, _ = seen_paths(layout, *cut_into_pieces(layout, tokens), window)
    return np.unique(index)


def _whole_paths(layout: TreeLayout, tokens: np.ndarray) -> np.ndarray:
    # Of each segment a prefix is needed: the whole segment if its subtree has own tokens after
    # it, else up to its last own token. lengths [3, 2, 4], parents [-1, 0, 0], tokens [4, 6]:
    #   before   [0 0 0 0 0 1 1 2 2 2]   own tokens before each token, and at the row's end
    #   is_full  [1, 0, 0]               before[9] > before[3] for the prompt
    #   last     [-1, 4, 6]   stops [3, 5, 7]   ->   0 1 2, 3 4, 5 6
    is_own = np.zeros(layout.num_tokens + 1, np.int64)
    is_own[1:][tokens] = 1
    before = np.cumsum(is_own)
    ends = layout.starts + layout.lengths
    is_full = before[layout.subtree_ends] > before[ends]
    last = np.full(layout.num_segments, -1, np.int64)
    segment_of = np.searchsorted(layout.starts, tokens, side="right") - 1
    np.maximum.at(last, segment_of, tokens)
    stops = np.where(is_full, ends, last + 1)
    return np.flatnonzero(np.arange(layout.num_tokens) < np.repeat(stops, layout.lengths))
