"""The one definition of which token sees which, and at what position.

A *row* is one packed token sequence. It holds independent prefix trees, one after another. Each
tree is cut into *segments*: runs of tokens without a branch. Segments are in depth-first
pre-order, so the descendants of a segment are the contiguous tokens directly after it. Two
integers per token then define everything: its position along its root path, and the end of its
subtree. Query token q sees key token k if and only if

    k <= q < subtree_end[k]

A sliding window of w tokens keeps the keys with position(q) - position(k) < w: it counts positions
along the root path, not tokens of the row.

A prompt of 3 tokens with responses of 2 and 4 tokens, `lengths [3, 2, 4]`, `parents [-1, 0, 0]`:

    starts          [0, 3, 5]
    subtree_ends    [9, 5, 9]
    first_positions [0, 3, 3]                    both responses follow the prompt
    position_ids    [0, 1, 2, 3, 4, 3, 4, 5, 6]

Numpy only. Indices are token indices within the row; intervals are half-open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_TOKENS = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Segments of one row in depth-first pre-order. Arrays are int32 with one entry per segment.

    Build it with `from_parents` or `concat`, which check the input and complete it.
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
    def from_parents(
        cls, lengths: Sequence[int] | np.ndarray, parents: Sequence[int] | np.ndarray
    ) -> TreeLayout:
        """Lay out segments that are given in depth-first pre-order.

        `lengths` are in tokens, `parents` are segment indices (-1 for a root). Raises ValueError
        with the segment and its values if a length is below 1, if a parent does not come before
        its child, or if the order is not pre-order.
        """
        lengths, parents = _checked_columns(lengths, parents)
        ends = np.cumsum(lengths, dtype=np.int64)
        num_tokens = int(ends[-1]) if len(ends) else 0
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"a row of {num_tokens} tokens exceeds {MAX_TOKENS}; split it")
        starts = ends - lengths
        subtree_ends, first_positions = _walk(starts.tolist(), lengths.tolist(), parents.tolist())
        return cls._frozen(
            num_tokens,
            starts=starts,
            lengths=lengths,
            parents=parents,
            subtree_ends=np.array(subtree_ends),
            first_positions=np.array(first_positions),
        )

    @classmethod
    def concat(cls, layouts: Iterable[TreeLayout]) -> TreeLayout:
        """Put forests one after another in one row. No layouts give a row without tokens."""
        layouts = [cls.from_parents([], []), *layouts]
        token_offsets = np.cumsum([0] + [layout.num_tokens for layout in layouts])
        num_tokens = int(token_offsets[-1])
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"a row of {num_tokens} tokens exceeds {MAX_TOKENS}; split it")
        # Layouts of 3 and 2 segments with 9 and 4 tokens:
        #   token_shift   [0, 0, 0, 9, 9]    added to token indices
        #   segment_shift [0, 0, 0, 3, 3]    added to parents, but not to the -1 of a root
        sizes = [layout.num_segments for layout in layouts]
        token_shift = np.repeat(token_offsets[:-1], sizes)
        segment_shift = np.repeat(np.cumsum([0] + sizes[:-1]), sizes)

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(layout, name) for layout in layouts])

        parents = joined("parents")
        return cls._frozen(
            num_tokens,
            starts=joined("starts") + token_shift,
            lengths=joined("lengths"),
            parents=np.where(parents < 0, -1, parents + segment_shift),
            subtree_ends=joined("subtree_ends") + token_shift,
            first_positions=joined("first_positions"),
        )

    @classmethod
    def _frozen(cls, num_tokens: int, **columns: np.ndarray) -> TreeLayout:
        """A layout of these columns, as read-only int32 arrays."""
        arrays = {name: np.array(column, dtype=np.int32) for name, column in columns.items()}
        for array in arrays.values():
            array.flags.writeable = False
        return cls(num_tokens=num_tokens, **arrays)

    @property
    def num_segments(self) -> int:
        """Segments in the row, over all of its trees."""
        return len(self.starts)

    @property
    def leaf_mask(self) -> np.ndarray:
        """bool [num_segments]: whether a segment has no children."""
        # In pre-order the first child comes directly after its parent, so a segment is a leaf
        # unless the next segment names it as parent: parents [-1, 0, 0, -1] -> [0, 1, 1, 1].
        leaf = np.ones(self.num_segments, dtype=bool)
        leaf[:-1] = self.parents[1:] != np.arange(self.num_segments - 1)
        return leaf

    def token_subtree_ends(self) -> np.ndarray:
        """int32 [num_tokens]: for each token the end of its segment's subtree."""
        return np.repeat(self.subtree_ends, self.lengths)

    def position_ids(self) -> np.ndarray:
        """int64 [num_tokens]: depth along the root path, in tokens; siblings repeat positions."""
        # starts [0, 3, 5], first_positions [0, 3, 3] -> shift [0, 0, -2]: token 5 has position 3.
        shift = self.first_positions.astype(np.int64) - self.starts
        return np.arange(self.num_tokens, dtype=np.int64) + np.repeat(shift, self.lengths)

    def positions_of(self, tokens: np.ndarray) -> np.ndarray:
        """int64: the position of each of `tokens`, as `position_ids` has it."""
        segment = np.searchsorted(self.starts, tokens, side="right") - 1
        return tokens - self.starts[segment].astype(np.int64) + self.first_positions[segment]

    @property
    def longest_path(self) -> int:
        """Tokens of the longest root path; 0 in an empty row."""
        return int((self.first_positions + self.lengths).max(initial=0))

    def root_paths(
        self, tokens: np.ndarray, since: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The root path of each token, itself included: the paths' tokens from root to leaf, one
        path after another, int64, and the length of each path, int64 [len(tokens)].

        With `since` a path begins at that position, one for each token and at most its own.
        """
        # Tokens [4, 8] of lengths [3, 2, 4], parents [-1, 0, 0]; one round per tree level:
        #   own segments   path [0, 1]  segment [1, 2]  length [2, 4]   up to the token itself
        #   parents        path [0, 1]  segment [0, 0]  length [3, 3]   whole segments
        # Sorted by path, then segment:  segments [0, 1, 0, 2], lengths [3, 2, 3, 4], that is
        #   index [0 1 2, 3 4 | 0 1 2, 5 6 7 8], path lengths [5, 7]
        # With since [1, 4] the root is skipped up to position 1 by the first path, and not
        # reached by the second, whose own segment starts at position 3:  [1 2, 3 4 | 6 7 8]
        segment = np.searchsorted(self.starts, tokens, side="right") - 1
        length = tokens - self.starts[segment] + 1
        path = np.arange(len(tokens))
        first = np.zeros(len(tokens), np.int64) if since is None else since
        rounds: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        while len(segment):
            position = self.first_positions[segment]
            skipped = np.maximum(first[path] - position, 0)
            rounds.append((path, segment, self.starts[segment] + skipped, length - skipped))
            parent = np.where(position > first[path], self.parents[segment], -1)
            path, segment = path[parent >= 0], parent[parent >= 0]
            length = self.lengths[segment].astype(np.int64)
        if not rounds:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        paths, segments, starts, lengths = (np.concatenate(x) for x in zip(*rounds, strict=True))
        order = np.lexsort((segments, paths))
        starts, lengths = starts[order], lengths[order]
        shift = starts - (np.cumsum(lengths) - lengths)
        index = np.arange(lengths.sum(), dtype=np.int64) + np.repeat(shift, lengths)
        return index, np.bincount(paths[order], lengths, len(tokens)).astype(np.int64)

    def area(self, window: int | None = None) -> int:
        """Number of visible (query, key) entries: a token at position p sees p + 1 keys, or the
        last `window` of them."""
        return visible_entries(self.first_positions, self.lengths, window)


def visible_entries(
    first_positions: np.ndarray, lengths: np.ndarray, window: int | None = None
) -> int:
    """(Query, key) entries that segments see, all together: `lengths` tokens each, the first of
    them at `first_positions` of its root path. A token sees the last `window` tokens of its path.
    """
    # A segment of n tokens from position p: (p + 1) + … + (p + n) = n p + n (n + 1) / 2. With a
    # window w < p + n its last token loses e = p + n - w entries, the one before it e - 1, …
    first, lengths = first_positions.astype(np.int64), lengths.astype(np.int64)
    area = int((lengths * first + lengths * (lengths + 1) // 2).sum())
    if window is None:
        return area
    lost = np.maximum(first + lengths - window, 0)
    losers = np.minimum(lost, lengths)
    return area - int((losers * lost - losers * (losers - 1) // 2).sum())


def _checked_columns(
    lengths: Sequence[int] | np.ndarray, parents: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both columns as int64. Checks all that needs no walk over the tree."""
    lengths = np.asarray(lengths, dtype=np.int64)
    parents = np.asarray(parents, dtype=np.int64)
    if lengths.ndim != 1 or lengths.shape != parents.shape:
        raise ValueError(
            f"lengths and parents need one entry per segment, got shapes {lengths.shape} "
            f"and {parents.shape}"
        )
    bad = np.flatnonzero(lengths < 1)
    if len(bad):
        raise ValueError(
            f"segment {bad[0]} has length {lengths[bad[0]]}, but a segment has at least 1 token: "
            "leave empty segments out"
        )
    bad = np.flatnonzero((parents < -1) | (parents >= np.arange(len(parents))))
    if len(bad):
        raise ValueError(
            f"segment {bad[0]} has parent {parents[bad[0]]}, but a parent is -1 or comes before "
            "its child: sort the segments in depth-first pre-order"
        )
    return lengths, parents


def _walk(starts: list[int], lengths: list[int], parents: list[int]) -> tuple[list[int], list[int]]:
    """Subtree ends and first positions, in one pass. Raises ValueError if it is no pre-order."""
    subtree_ends = [0] * len(starts)
    first_positions = [0] * len(starts)
    # Segments whose subtree has not ended, root first. With parents [-1, 0, 1, 0] it is
    # [0], [0, 1], [0, 1, 2], then 2 and 1 end where segment 3 starts, and it is [0, 3].
    open_path: list[int] = []
    for segment, parent in enumerate(parents):
        while open_path and open_path[-1] != parent:
            subtree_ends[open_path.pop()] = starts[segment]
        if parent >= 0:
            if not open_path:
                raise ValueError(
                    f"segment {segment} has parent {parent}, whose interval was closed before it: "
                    "sort the segments in depth-first pre-order"
                )
            first_positions[segment] = first_positions[parent] + lengths[parent]
        open_path.append(segment)
    for segment in open_path:
        subtree_ends[segment] = starts[-1] + lengths[-1]
    return subtree_ends, first_positions
