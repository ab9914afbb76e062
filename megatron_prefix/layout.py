"""The one definition of which token sees which, and at what position.

A *row* is one packed token sequence holding several independent prefix trees, one behind another.
Each tree is cut into *segments* (a run of tokens without a branch in it), laid out in depth-first
pre-order, so that the descendants of a segment are the contiguous tokens right behind it. Two
integers a token then say everything: its position along its root path, and the end of its
subtree. Query row q sees key row k if and only if

    k <= q < subtree_end[k]

A prompt of 3 tokens with responses of 2 and 4 tokens, `lengths [3, 2, 4]`, `parents [-1, 0, 0]`:

    starts          [0, 3, 5]
    subtree_ends    [9, 5, 9]
    first_positions [0, 3, 3]                    both responses follow the prompt
    position_ids    [0, 1, 2, 3, 4, 3, 4, 5, 6]

Numpy only; indices are token indices within the row, intervals half-open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_TOKENS = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Segments of one row in depth-first pre-order; every array is int32 with one entry a segment.

    Build it with `from_parents` or `concat`, which check and complete it.
    """

    starts: np.ndarray
    """First token of each segment."""
    lengths: np.ndarray
    """Number of tokens of each segment, at least 1."""
    parents: np.ndarray
    """Segment index of each segment's parent; -1 at a root."""
    subtree_ends: np.ndarray
    """Token index one past the last descendant of each segment."""
    first_positions: np.ndarray
    """Position (depth along the root path, in tokens) of each segment's first token."""
    num_tokens: int
    """Tokens in the row: the sum of `lengths`."""

    @classmethod
    def from_parents(cls, lengths: Sequence[int], parents: Sequence[int]) -> TreeLayout:
        """Lay out segments given in depth-first pre-order.

        `lengths` are in tokens, `parents` are segment indices (-1 for a root). Raises ValueError,
        naming the segment and its values, where a length is below 1, a parent does not come
        before its child, or a parent's interval was already closed by a segment outside of it.
        """
        lengths, parents = _checked_columns(lengths, parents)
        ends = np.cumsum(lengths, dtype=np.int64)
        num_tokens = int(ends[-1]) if len(ends) else 0
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"a row of {num_tokens} tokens exceeds {MAX_TOKENS}; split it")
        starts = ends - lengths
        subtree_ends, first_positions = _walk(starts.tolist(), lengths.tolist(), parents.tolist())
        return cls._frozen(starts, lengths, parents, subtree_ends, first_positions, num_tokens)

    @classmethod
    def concat(cls, layouts: Iterable[TreeLayout]) -> TreeLayout:
        """Put forests behind each other in one row; no layouts give a row of no tokens."""
        layouts = [cls.from_parents([], []), *layouts]
        token_offsets = np.cumsum([0] + [layout.num_tokens for layout in layouts])
        num_tokens = int(token_offsets[-1])
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"a row of {num_tokens} tokens exceeds {MAX_TOKENS}; split it")
        sizes = [layout.num_segments for layout in layouts]
        token_shift = np.repeat(token_offsets[:-1], sizes)
        segment_shift = np.repeat(np.cumsum([0] + sizes[:-1]), sizes)

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(layout, name) for layout in layouts])

        parents = joined("parents")
        return cls._frozen(
            joined("starts") + token_shift,
            joined("lengths"),
            np.where(parents < 0, -1, parents + segment_shift),
            joined("subtree_ends") + token_shift,
            joined("first_positions"),
            num_tokens,
        )

    @classmethod
    def _frozen(cls, *columns_and_count) -> TreeLayout:
        *columns, num_tokens = columns_and_count
        columns = [np.array(column, dtype=np.int32) for column in columns]
        for column in columns:
            column.flags.writeable = False
        return cls(*columns, num_tokens=num_tokens)

    @property
    def num_segments(self) -> int:
        """Segments in the row, over all of its trees."""
        return len(self.starts)

    @property
    def leaf_mask(self) -> np.ndarray:
        """bool [num_segments]: whether a segment has no children.

        In pre-order a first child stands right behind its parent, so one comparison tells.
        """
        leaf = np.ones(self.num_segments, dtype=bool)
        leaf[:-1] = self.parents[1:] != np.arange(self.num_segments - 1)
        return leaf

    def token_subtree_ends(self) -> np.ndarray:
        """int32 [num_tokens]: the end of the subtree each token stands in the segment of."""
        return np.repeat(self.subtree_ends, self.lengths)

    def position_ids(self) -> np.ndarray:
        """int64 [num_tokens]: depth along the root path, in tokens; siblings repeat positions."""
        shift = self.first_positions.astype(np.int64) - self.starts
        return np.arange(self.num_tokens, dtype=np.int64) + np.repeat(shift, self.lengths)

    def area(self) -> int:
        """Number of visible (query, key) entries: a token at position p sees p + 1 keys."""
        lengths = self.lengths.astype(np.int64)
        return int((lengths * self.first_positions + lengths * (lengths + 1) // 2).sum())


def _checked_columns(lengths, parents) -> tuple[np.ndarray, np.ndarray]:
    """Both columns as int64, with everything checked that needs no walk."""
    lengths = np.asarray(lengths, dtype=np.int64)
    parents = np.asarray(parents, dtype=np.int64)
    if lengths.ndim != 1 or lengths.shape != parents.shape:
        raise ValueError(
            f"lengths and parents need one entry a segment, got shapes {lengths.shape} "
            f"and {parents.shape}"
        )
    bad = np.flatnonzero(lengths < 1)
    if len(bad):
        raise ValueError(
            f"segment {bad[0]} has length {lengths[bad[0]]}; a segment has at least 1 token, "
            "so leave empty ones out"
        )
    bad = np.flatnonzero((parents < -1) | (parents >= np.arange(len(parents))))
    if len(bad):
        raise ValueError(
            f"segment {bad[0]} has parent {parents[bad[0]]}; a parent is -1 or comes before its "
            "child, so sort the segments in depth-first pre-order"
        )
    return lengths, parents


def _walk(starts: list, lengths: list, parents: list) -> tuple[list, list]:
    """Subtree ends and first positions in one pass, refusing what is not pre-order."""
    subtree_ends = [0] * len(starts)
    first_positions = [0] * len(starts)
    open_path: list[int] = []  # segments whose interval is still open, root first
    for segment, parent in enumerate(parents):
        while open_path and open_path[-1] != parent:
            subtree_ends[open_path.pop()] = starts[segment]
        if parent >= 0:
            if not open_path:
                raise ValueError(
                    f"segment {segment} has parent {parent}, whose interval was closed before it: "
                    "segments have to stand in depth-first pre-order"
                )
            first_positions[segment] = first_positions[parent] + lengths[parent]
        open_path.append(segment)
    for segment in open_path:
        subtree_ends[segment] = starts[-1] + lengths[-1]
    return subtree_ends, first_positions
