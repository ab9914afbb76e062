"""Which tokens of a row each context-parallel rank owns.

Every rank owns the same number of tokens, so that linear layers take it the same time. A token
deep in a long tree sees more keys than one in a short tree, so the ranks' attention area would
differ; and a rank needs the keys on the root paths of its tokens, which others own. `tree_aware`
starts from contiguous parts, cut into chunks, and swaps chunks between the slowest rank and the
others until the modelled times of all are alike:

    row of 16 rows: one tree of 8 tokens, eight trees of 1     (two ranks, chunks of 4)
    contiguous  [0 .. 8)  [8 .. 16)           area 36 and 8
    swapped     [0 .. 4) + [12 .. 16)  [4 .. 12)    area 14 and 30

Every rank computes the same answer from the layout alone. Numpy only.

Shapes: T tokens, Q chunks, S segments, K rows needed of each chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_prefix.layout import TreeLayout

CHUNKS_PER_RANK = 32
RUN_LENGTHS = (1, 4, 12)
"""Chunks that change owners together: the first of a long tree brings its root path along, which
pays for several at once."""
TOLERANCE = 0.01
"""Swapping stops where the slowest rank is this little above the mean."""

KEY_WEIGHTS = (1.0, 0.5, 0.2, 0.0)
"""What a key counts against area, one after another until a start ends in balance."""
KEY_PRICE = 0.05
"""What a key sent costs beside the time of the slower rank: of like swaps the one with fewer."""

LINEAR_FLOPS, ATTENTION_FLOPS, LINK_BYTES = 500e12, 350e12, 100e9
"""A second of one Hopper GPU and its link, by order of magnitude; only their ratios matter."""


@dataclass(frozen=True, kw_only=True)
class ContextCost:
    """Modelled seconds of one layer on one rank, forward and backward."""

    per_token: float
    """A token it owns: linear layers."""
    per_entry: float
    """A (query, key) entry that its tokens see: attention."""
    per_key: float
    """A row of keys and values that it receives."""

    @classmethod
    def of_layer(
        cls,
        *,
        hidden_size: int,
        ffn_hidden_size: int,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        key_bytes: int,
    ) -> ContextCost:
        """From a layer's sizes; `key_bytes` are sent for each channel of a key, both ways.

        Backward takes twice the forward pass in linear layers and 2.5 times in attention.
        """
        linear = 2 * hidden_size * head_dim * 2 * (num_heads + num_groups)
        linear += 6 * hidden_size * ffn_hidden_size
        return cls(
            per_token=3 * linear / LINEAR_FLOPS,
            per_entry=3.5 * 4 * num_heads * head_dim / ATTENTION_FLOPS,
            per_key=2 * num_groups * head_dim * key_bytes / LINK_BYTES,
        )


def contiguous(layout: TreeLayout, size: int) -> list[np.ndarray]:
    """Equal parts in the order of the row; ascending rows of each rank, int64 [T / size]."""
    return list(np.arange(layout.num_tokens, dtype=np.int64).reshape(size, -1))


def zigzag(layout: TreeLayout, size: int) -> list[np.ndarray]:
    """Of 2 x size parts, rank r has part r and part r from the end: balance for one causal row."""
    parts = np.array_split(np.arange(layout.num_tokens, dtype=np.int64), 2 * size)
    return [np.concatenate([parts[r], parts[-1 - r]]) for r in range(size)]


def needed_rows(layout: TreeLayout, rows: np.ndarray) -> np.ndarray:
    """Rows on the root paths of `rows`, themselves included, ascending, int64."""
    is_own = np.zeros(layout.num_tokens + 1, np.int64)
    is_own[1:][rows] = 1
    before = np.cumsum(is_own)
    ends = layout.starts + layout.lengths
    is_full = before[layout.subtree_ends] > before[ends]
    last = np.full(layout.num_segments, -1, np.int64)
    segment_of = np.searchsorted(layout.starts, rows, side="right") - 1
    np.maximum.at(last, segment_of, rows)
    stops = np.where(is_full, ends, last + 1)
    return np.flatnonzero(np.arange(layout.num_tokens) < np.repeat(stops, layout.lengths))


def area_of(layout: TreeLayout, rows: np.ndarray) -> int:
    """(Query, key) entries that these rows see."""
    return int((layout.position_ids()[rows] + 1).sum())


def tree_aware(layout: TreeLayout, size: int, cost: ContextCost) -> list[np.ndarray]:
    """Equal parts of like modelled time, with few keys to send; see the module's example."""
    if size == 1:
        return contiguous(layout, size)
    chunks = _Chunks.cut(layout, size)
    starts = [(chunks.owner, weight) for weight in KEY_WEIGHTS]
    found = []
    for start, weight in [*starts, (_spread_area(chunks, size), 1.0)]:
        chunks.owner = start.copy()
        if weight < 1:
            _Swaps(chunks, size, replace(cost, per_key=weight * cost.per_key)).run()
        swaps = _Swaps(chunks, size, cost)
        swaps.run()
        found.append((swaps.times.max(), chunks.owner))
        if swaps.is_balanced:
            break
    chunks.owner = min(found, key=lambda x: x[0])[1]
    return chunks.rows_by_rank(size)


def greedy_by_area(layout: TreeLayout, size: int) -> list[np.ndarray]:
    """Chunks of largest area first, each to the rank with the least area that has places left:
    balance without a thought for keys, to compare with."""
    chunks = _Chunks.cut(layout, size)
    chunks.owner = _spread_area(chunks, size)
    return chunks.rows_by_rank(size)


def _spread_area(chunks: _Chunks, size: int) -> np.ndarray:
    """Owners of chunks whose area is spread evenly."""
    owner, movable = chunks.owner.copy(), np.flatnonzero(chunks.is_movable)
    areas = np.bincount(owner, np.where(chunks.is_movable, 0, chunks.area), size)
    places = np.full(size, len(movable) // size)
    for chunk in movable[np.argsort(-chunks.area[movable], kind="stable")]:
        rank = int(np.where(places > 0, areas, np.inf).argmin())
        owner[chunk] = rank
        areas[rank] += chunks.area[chunk]
        places[rank] -= 1
    return owner


@dataclass(eq=False)
class _Chunks:
    """A row cut into chunks; `owner` changes as they are swapped."""

    starts: np.ndarray
    stops: np.ndarray
    area: np.ndarray
    owner: np.ndarray
    is_movable: np.ndarray
    """Chunks of the common length; what a part leaves over stays where it is."""
    needs: np.ndarray
    """int64 [Q, Q]: rows of chunk k that chunk q needs."""

    @classmethod
    def cut(cls, layout: TreeLayout, size: int) -> _Chunks:
        part = layout.num_tokens // size
        assert part * size == layout.num_tokens, (layout.num_tokens, size)
        length = max(part // CHUNKS_PER_RANK, 1)
        offsets = np.arange(0, part, length)
        starts = (np.arange(size)[:, None] * part + offsets).ravel()
        stops = np.append(starts[1:], layout.num_tokens)
        seen = np.concatenate([[0], np.cumsum(layout.position_ids() + 1)])
        return cls(
            starts=starts,
            stops=stops,
            area=seen[stops] - seen[starts],
            owner=np.repeat(np.arange(size), len(offsets)),
            is_movable=stops - starts == length,
            needs=_needs(layout, starts, stops),
        )

    def rows_by_rank(self, size: int) -> list[np.ndarray]:
        rows = np.arange(self.stops[-1], dtype=np.int64)
        owner = np.repeat(self.owner, self.stops - self.starts)
        return [rows[owner == rank] for rank in range(size)]


def _needs(layout: TreeLayout, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """[Q, Q]: rows of each chunk (column) on the root paths of each chunk's (row) tokens.

    A chunk needs a whole segment if it has tokens further down that segment's subtree, and
    else the segment up to the chunk's last token in it.
    """
    first, ends = layout.starts.astype(np.int64), (layout.starts + layout.lengths).astype(np.int64)
    a, b = starts[:, None], stops[:, None]
    is_below = np.maximum(a, ends) < np.minimum(b, layout.subtree_ends)
    within = np.where(np.maximum(a, first) < np.minimum(b, ends), np.minimum(b, ends) - first, 0)
    needed = np.where(is_below, layout.lengths, within)  # a prefix of every segment, [Q, S]
    before = np.zeros((len(starts), len(first) + 1), np.int64)
    np.cumsum(needed, axis=1, out=before[:, 1:])
    bounds = np.append(starts, stops[-1])
    segment = np.minimum(np.searchsorted(ends, bounds, side="right"), len(first) - 1)
    upto = before[:, segment] + np.minimum(bounds - first[segment], needed[:, segment])
    return np.diff(upto, axis=1)


class _Swaps:
    """Swaps of movable chunks between the slowest rank and the others."""

    def __init__(self, chunks: _Chunks, size: int, cost: ContextCost) -> None:
        self.chunks, self.size, self.cost = chunks, size, cost
        self.token_time = cost.per_token * int(chunks.stops[-1]) / size
        self.needed = np.stack([self._needed(rank) for rank in range(size)])
        self.times = np.array([self._time(rank) for rank in range(size)])

    def run(self) -> None:
        for _ in range(4 * CHUNKS_PER_RANK * self.size):
            slow = int(self.times.argmax())
            if self.is_balanced or not self._swap(slow, self._best(slow)):
                return

    @property
    def is_balanced(self) -> bool:
        return bool(self.times.max() <= (1 + TOLERANCE) * self.times.mean())

    def _needed(self, rank: int) -> np.ndarray:
        """Rows of each chunk that a rank needs, [Q]: the most that one of its chunks does."""
        return self.chunks.needs[self.chunks.owner == rank].max(axis=0)

    def _time(self, rank: int) -> float:
        is_own = self.chunks.owner == rank
        area = self.chunks.area[is_own].sum()
        received = self.needed[rank][~is_own].sum()
        return self.token_time + self.cost.per_entry * area + self.cost.per_key * received

    def _best(self, slow: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The runs of chunks whose exchange leaves the slower of both ranks fastest."""
        best, chosen = self.times[slow], None
        for length in RUN_LENGTHS:
            given = self._runs(slow, length)
            for rank in np.flatnonzero(self.times < self.times.mean()):
                taken = self._runs(rank, length)
                if not (len(given) and len(taken)):
                    continue
                area = (self.chunks.area[x].sum(axis=1) for x in (given, taken))
                gain = self.cost.per_entry * np.subtract.outer(*area)
                from_slow, to_rank = self._spared(slow, given), self._added(rank, given)
                from_rank, to_slow = self._spared(rank, taken), self._added(slow, taken)
                later = np.maximum(
                    self.times[slow] - gain + np.subtract.outer(-from_slow, -to_slow),
                    self.times[rank] + gain + np.subtract.outer(to_rank, from_rank),
                )
                later = later + KEY_PRICE * np.add.outer(to_rank - from_slow, to_slow - from_rank)
                i, j = np.unravel_index(later.argmin(), later.shape)
                if later[i, j] < best:
                    best, chosen = later[i, j], (given[i], taken[j])
        return chosen

    def _runs(self, rank: int, length: int) -> np.ndarray:
        """Movable chunks of a rank, `length` together in its order, [runs, length]."""
        own = np.flatnonzero((self.chunks.owner == rank) & self.chunks.is_movable)
        if len(own) < length:
            return own[:0].reshape(0, length)
        return np.lib.stride_tricks.sliding_window_view(own, length)[:: max(length // 2, 1)]

    def _added(self, rank: int, runs: np.ndarray) -> np.ndarray:
        """Modelled time of the keys that a rank would need anew with each of `runs`."""
        foreign = self.chunks.owner != rank
        needs = self.chunks.needs[runs].max(axis=1)[:, foreign]
        more = needs - self.needed[rank][foreign]
        return self.cost.per_key * np.maximum(more, 0).sum(axis=1)

    def _spared(self, rank: int, runs: np.ndarray) -> np.ndarray:
        """Modelled time of the keys that a rank would no longer need without each of `runs`."""
        own = np.flatnonzero(self.chunks.owner == rank)
        foreign = self.chunks.owner != rank
        needs = self.chunks.needs[own][:, foreign]
        nothing = np.zeros((1, needs.shape[1]), needs.dtype)
        before = np.concatenate([nothing, np.maximum.accumulate(needs)])
        behind = np.concatenate([np.maximum.accumulate(needs[::-1])[::-1], nothing])
        first, last = np.searchsorted(own, runs[:, 0]), np.searchsorted(own, runs[:, -1])
        kept = np.maximum(before[first], behind[last + 1])
        return self.cost.per_key * (self.needed[rank][foreign] - kept).sum(axis=1)

    def _swap(self, slow: int, runs: tuple[np.ndarray, np.ndarray] | None) -> bool:
        """Exchange two runs; False, and everything as it was, where that does not help."""
        if runs is None:
            return False
        given, taken = runs
        other = int(self.chunks.owner[taken[0]])
        before = self.times[slow]
        self.chunks.owner[given], self.chunks.owner[taken] = other, slow
        self._update(slow, other)
        if max(self.times[slow], self.times[other]) < before:
            return True
        self.chunks.owner[given], self.chunks.owner[taken] = slow, other
        self._update(slow, other)
        return False

    def _update(self, *ranks: int) -> None:
        for rank in ranks:
            self.needed[rank] = self._needed(rank)
            self.times[rank] = self._time(rank)
