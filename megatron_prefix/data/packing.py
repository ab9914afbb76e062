"""Items of known lengths -> rows of bounded length; an item is never split.

    first_fit_decreasing([3, 7, 5, 2], capacity=8) -> [[1], [2, 0], [3]]

Lengths are tokens. Items are given and returned as indices into the list of lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


class _FirstFit:
    """Leftmost bin with room, in O(log bins): a tree of the largest room in each half.

    `room[1]` is the root, `room[leaves + i]` belongs to bin i.
    """

    def __init__(self, capacity: int, max_bins: int) -> None:
        self.leaves = 1 << max(max_bins - 1, 0).bit_length()
        self.room = [capacity] * (2 * self.leaves)

    def place(self, length: int) -> int:
        room, node = self.room, 1
        while node < self.leaves:
            node *= 2
            if room[node] < length:
                node += 1
        chosen = node - self.leaves
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
        return chosen


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Place the longest item first, each into the first row that has room (Johnson 1973).

    Raises ValueError where an item is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"item {lengths.argmax()} has {lengths.max()} tokens, a row {capacity}")
    rows: list[list[int]] = []
    fit = _FirstFit(capacity, len(lengths))
    for item in np.argsort(-lengths, kind="stable").tolist():
        row = fit.place(int(lengths[item]))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
    return rows


def spread(lengths: Sequence[int], capacity: int, num_rows: int) -> list[list[int]] | None:
    """Place the longest item first, each into the emptiest of `num_rows` rows (Graham 1969).

    Returns None where an item does not fit that way.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for item in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        used, row = heapq.heappop(heap)
        if used + lengths[item] > capacity:
            return None
        rows[row].append(item)
        heapq.heappush(heap, (used + int(lengths[item]), row))
    return rows


def pack_step(lengths: Sequence[int], capacity: int, multiple: int) -> list[list[int]]:
    """Pack one step's items into as few rows as a multiple of `multiple` allows.

    Rows beyond what first-fit-decreasing needs take their share of the items, so that all
    ranks have like work; they stay empty only where there are fewer items than rows.
    """
    rows = first_fit_decreasing(lengths, capacity)
    num_rows = -(-max(len(rows), 1) // multiple) * multiple
    if num_rows > len(rows):
        rows = spread(lengths, capacity, num_rows) or rows
    return rows + [[] for _ in range(num_rows - len(rows))]


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Give every rank the same number of rows and like total cost.

    The costliest row first, each to the rank with the least cost among those with places left;
    a rank's rows come back in ascending order. `len(costs)` must be a multiple of `num_ranks`.
    """
    share = len(costs) // num_ranks
    assert share * num_ranks == len(costs), (len(costs), num_ranks)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for row in np.argsort(-np.asarray(costs, np.float64), kind="stable").tolist():
        cost, rank = heapq.heappop(heap)
        ranks[rank].append(row)
        if len(ranks[rank]) < share:
            heapq.heappush(heap, (cost + float(costs[row]), rank))
    return [sorted(rows) for rows in ranks]
