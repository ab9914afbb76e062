"""The tokens of a row that each context-parallel rank owns.

Every rank owns the same number of tokens, so linear layers take the same time on all ranks. But
a token deep in a long tree sees more keys than a token of a short tree, so contiguous parts can
differ in attention area. A rank also needs the keys on the root paths of its tokens, and some of
them belong to other ranks. `tree_aware` starts with contiguous parts, cuts them into chunks, and
swaps chunks between the slowest rank and the others until all modelled times are nearly equal:

    a row of 16 tokens: one tree of 8 tokens, eight trees of 1      (two ranks, chunks of 4)
    contiguous  [0, 8)              [8, 16)    area 36 and 8
    swapped     [0, 4) + [12, 16)   [4, 12)    area 14 and 30

Every rank computes the same result from the layout alone. Numpy only.

Shapes: T tokens, Q chunks, S segments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_prefix.attention.layer_settings import attention_channels, layer_windows
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.layout import TreeLayout

CHUNKS_PER_RANK = 32
RUN_LENGTHS = (1, 4, 12)
"""Numbers of chunks that are swapped together. The first chunk of a long tree makes its new owner
receive the root path, which is worth it only for several chunks."""
TOLERANCE = 0.01
"""Swapping stops when the slowest rank is at most this fraction above the mean."""

KEY_WEIGHTS = (1.0, 0.5, 0.2, 0.0)
"""Weights of a transferred key relative to its modelled time, tried in turn until the search
ends in balance. Small ones help the search out of a poor start."""
KEY_PRICE = 0.05
"""Weight of transferred keys beside the time of the slower rank: of similar swaps, the one with
fewer keys wins."""

LINEAR_FLOPS, ATTENTION_FLOPS, LINK_BYTES = 500e12, 350e12, 100e9
"""Rates of one Hopper GPU and its link, per second, by order of magnitude. Only ratios matter."""


@dataclass(frozen=True, kw_only=True)
class ContextCost:
    """Modelled seconds of one layer on one rank, forward and backward."""

    per_token: float
    """Per token that the rank owns: linear layers."""
    per_entry: float
    """Per (query, key) entry that its tokens see: attention."""
    per_key: float
    """Per token whose key and value it receives."""
    windows: Mapping[int | None, float] = field(default_factory=lambda: {None: 1.0})
    """Share of the layers that have each sliding window, in tokens; None: without a window."""

    @classmethod
    def of_model(cls, config: Any) -> ContextCost:
        """The mean of a model's layers; `config` is its TransformerConfig."""
        size = config.params_dtype.itemsize
        return cls.of_layer(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.moe_router_topk * config.moe_ffn_hidden_size
            if config.num_moe_experts
            else config.ffn_hidden_size,
            num_heads=config.num_attention_heads,
            num_groups=config.num_query_groups,
            head_dim=attention_channels(config),
            # bfloat16: 2 + 2 + 4 = 8 bytes
            key_bytes=size + size + max(size, 4),  # in forward, again in backward, gradients
            windows=layer_windows(config),
        )

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
        windows: Sequence[int | None] = (None,),
    ) -> ContextCost:
        """From a layer's sizes. `key_bytes` are sent per channel of a key, forward and backward;
        `windows` are the sliding windows of all layers, in tokens.

        Backward takes twice as long as forward in linear layers, and 2.5 times in attention.
        """
        linear = 2 * hidden_size * head_dim * 2 * (num_heads + num_groups)
        linear += 6 * hidden_size * ffn_hidden_size
        return cls(
            per_token=3 * linear / LINEAR_FLOPS,
            per_entry=3.5 * 4 * num_heads * head_dim / ATTENTION_FLOPS,
            per_key=2 * num_groups * head_dim * key_bytes / LINK_BYTES,
            windows={w: n / len(windows) for w, n in Counter(windows).items()},
        )


def contiguous(layout: TreeLayout, size: int) -> list[np.ndarray]:
    """Equal parts in the order of the row: the tokens of each rank, ascending, int64 [T / size]."""
    return list(np.arange(layout.num_tokens, dtype=np.int64).reshape(size, -1))


def zigzag(layout: TreeLayout, size: int) -> list[np.ndarray]:
    """Of 2 x size parts, rank r has part r and part r from the end: balances one long text."""
    parts = np.array_split(np.arange(layout.num_tokens, dtype=np.int64), 2 * size)
    return [np.concatenate([parts[r], parts[-1 - r]]) for r in range(size)]


def area_of(layout: TreeLayout, tokens: np.ndarray, window: int | None = None) -> int:
    """(Query, key) entries that these tokens see."""
    return int(_num_seen(layout, window)[tokens].sum())


def _num_seen(layout: TreeLayout, window: int | None) -> np.ndarray:
    """int64 [T]: the keys that each token sees."""
    seen = layout.position_ids() + 1
    return seen if window is None else np.minimum(seen, window)


def tree_aware(layout: TreeLayout, size: int, cost: ContextCost) -> list[np.ndarray]:
    """Equal parts of similar modelled time, with few keys to send; see the module's example."""
    if size == 1:
        return contiguous(layout, size)
    chunks = _Chunks.cut(layout, size, cost.windows)
    starts = [(chunks.owner, weight) for weight in KEY_WEIGHTS]
    results = []
    for start, weight in [*starts, (_spread_area(chunks, size), 1.0)]:
        chunks.owner = start.copy()
        if weight < 1:
            _Swaps(chunks, size, replace(cost, per_key=weight * cost.per_key)).run()
        swaps = _Swaps(chunks, size, cost)
        swaps.run()
        results.append((swaps.times.max(), chunks.owner))
        if swaps.is_balanced:
            break
    chunks.owner = min(results, key=lambda x: x[0])[1]
    return chunks.tokens_by_rank(size)


def greedy_by_area(layout: TreeLayout, size: int) -> list[np.ndarray]:
    """Chunks of largest area first, each to the rank with the least area that has places left.

    Balances area and ignores keys; for comparison with `tree_aware`."""
    chunks = _Chunks.cut(layout, size, {None: 1.0})
    chunks.owner = _spread_area(chunks, size)
    return chunks.tokens_by_rank(size)


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
    """Whether a chunk has the common length. The rest of a part, which is shorter, is not moved."""
    needs: np.ndarray
    """[Q, Q]: how many tokens of chunk k (column) chunk q (row) needs. Area and needs are means of
    the layers, which may have different windows."""

    @classmethod
    def cut(cls, layout: TreeLayout, size: int, windows: Mapping[int | None, float]) -> _Chunks:
        # 20 tokens, 2 ranks, chunks of 4:  starts [0 4 8 10 14 18], stops [4 8 10 14 18 20],
        # owner [0 0 0 1 1 1], is_movable [1 1 0 1 1 0]
        part = layout.num_tokens // size
        assert part * size == layout.num_tokens, (layout.num_tokens, size)
        length = max(part // CHUNKS_PER_RANK, 1)
        offsets = np.arange(0, part, length)
        starts = (np.arange(size)[:, None] * part + offsets).ravel()
        stops = np.append(starts[1:], layout.num_tokens)
        shares = windows.items()
        num_seen = np.sum([share * _num_seen(layout, w) for w, share in shares], axis=0)
        seen = np.concatenate([[0], np.cumsum(num_seen)])
        return cls(
            starts=starts,
            stops=stops,
            area=seen[stops] - seen[starts],
            owner=np.repeat(np.arange(size), len(offsets)),
            is_movable=stops - starts == length,
            needs=np.sum([share * _needs(layout, starts, stops, w) for w, share in shares], axis=0),
        )

    def tokens_by_rank(self, size: int) -> list[np.ndarray]:
        tokens = np.arange(self.stops[-1], dtype=np.int64)
        owner = np.repeat(self.owner, self.stops - self.starts)
        return [tokens[owner == rank] for rank in range(size)]


def _needs(
    layout: TreeLayout, starts: np.ndarray, stops: np.ndarray, window: int | None = None
) -> np.ndarray:
    """[Q, Q]: how many tokens of chunk k (column) are on the root paths of chunk q's (row) tokens,
    or among the last `window` tokens of these paths.

    A chunk needs a whole segment if it has tokens in the subtree after that segment. Else it
    needs the segment up to the chunk's last token in it.
    """
    # lengths [3, 2, 4], parents [-1, 0, 0], chunks [0, 3), [3, 6), [6, 9):
    #   needed  [[3 0 0], [3 2 1], [3 0 4]]   tokens of each segment that each chunk needs
    #   result  [[3 0 0], [3 3 0], [3 1 3]]   the same tokens, counted by chunk: chunk 2 needs
    #                                         0 1 2 of chunk 0, 5 of chunk 1, 6 7 8 of its own
    if window is not None and window < layout.longest_path:
        chunks = zip(starts.tolist(), stops.tolist(), strict=True)
        tokens = [needed_tokens(layout, np.arange(start, stop), window) for start, stop in chunks]
        chunk_of = [np.searchsorted(starts, x, side="right") - 1 for x in tokens]
        return np.stack([np.bincount(x, minlength=len(starts)) for x in chunk_of])
    first, ends = layout.starts.astype(np.int64), (layout.starts + layout.lengths).astype(np.int64)
    a, b = starts[:, None], stops[:, None]
    is_below = np.maximum(a, ends) < np.minimum(b, layout.subtree_ends)
    within = np.where(np.maximum(a, first) < np.minimum(b, ends), np.minimum(b, ends) - first, 0)
    needed = np.where(is_below, layout.lengths, within)  # a prefix of every segment, [Q, S]
    before = np.zeros((len(starts), len(first) + 1), np.int64)
    np.cumsum(needed, axis=1, out=before[:, 1:])
    bounds = np.append(starts, stops[-1])
    segment = np.minimum(np.searchsorted(ends, bounds, side="right"), len(first) - 1)
    # Needed tokens before each chunk boundary: those of earlier segments, and of the segment that
    # holds the boundary as many as lie before it.
    before_bound = before[:, segment] + np.minimum(bounds - first[segment], needed[:, segment])
    return np.diff(before_bound, axis=1)


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
        """Tokens of each chunk that a rank needs, [Q]: the most that one of its chunks needs. With
        windows it may need more, because they do not all begin at the root."""
        return self.chunks.needs[self.chunks.owner == rank].max(axis=0)

    def _time(self, rank: int) -> float:
        is_own = self.chunks.owner == rank
        area = self.chunks.area[is_own].sum()
        received = self.needed[rank][~is_own].sum()
        return self.token_time + self.cost.per_entry * area + self.cost.per_key * received

    def _best(self, slow: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The two runs of chunks whose swap leaves the slower of both ranks fastest, or None."""
        best, chosen = self.times[slow], None
        for length in RUN_LENGTHS:
            given = self._runs(slow, length)
            for rank in np.flatnonzero(self.times < self.times.mean()).tolist():
                taken = self._runs(rank, length)
                if not (len(given) and len(taken)):
                    continue
                # Every matrix is [given, taken]: the effect of each possible swap, for example
                # gain[i, j] is the time of attention that run i takes away and run j brings.
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
        """Movable chunks of a rank, `length` consecutive ones per run, [runs, length]."""
        # Own chunks [0 1 2 3 6 7], length 4: windows start at every second chunk, half a length
        # apart, so [0 1 2 3] and [2 3 6 7].
        own = np.flatnonzero((self.chunks.owner == rank) & self.chunks.is_movable)
        if len(own) < length:
            return own[:0].reshape(0, length)
        return np.lib.stride_tricks.sliding_window_view(own, length)[:: max(length // 2, 1)]

    def _added(self, rank: int, runs: np.ndarray) -> np.ndarray:
        """Modelled time of the additional keys that a rank would need with each of `runs`."""
        foreign = self.chunks.owner != rank
        needs = self.chunks.needs[runs].max(axis=1)[:, foreign]
        more = needs - self.needed[rank][foreign]
        return self.cost.per_key * np.maximum(more, 0).sum(axis=1)

    def _spared(self, rank: int, runs: np.ndarray) -> np.ndarray:
        """Modelled time of the keys that a rank would no longer need without each of `runs`."""
        # A rank needs of a foreign chunk the most that one of its chunks needs. Without the own
        # chunks i to j that is the larger of before[i] and after[j + 1]. Needs [2, 5, 1] of one
        # foreign chunk: before [0, 2, 5, 5], after [5, 5, 1, 0]. Without the second own chunk
        # max(before[1], after[2]) = 2 tokens remain, and 5 - 2 are spared.
        own = np.flatnonzero(self.chunks.owner == rank)
        foreign = self.chunks.owner != rank
        needs = self.chunks.needs[own][:, foreign]
        nothing = np.zeros((1, needs.shape[1]), needs.dtype)
        before = np.concatenate([nothing, np.maximum.accumulate(needs)])
        after = np.concatenate([np.maximum.accumulate(needs[::-1])[::-1], nothing])
        first, last = np.searchsorted(own, runs[:, 0]), np.searchsorted(own, runs[:, -1])
        remaining = np.maximum(before[first], after[last + 1])
        return self.cost.per_key * (self.needed[rank][foreign] - remaining).sum(axis=1)

    def _swap(self, slow: int, runs: tuple[np.ndarray, np.ndarray] | None) -> bool:
        """Swap two runs. If that does not help, undo it and return False."""
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
