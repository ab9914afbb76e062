"""Packing: items of known lengths -> rows of bounded length; an item is never split.

    first_fit_decreasing([3, 7, 5, 2], capacity=8) -> [[1], [2, 0], [3]]

Item 1 (7 tokens) opens row 0. Item 2 (5) does not fit there and opens row 1. Item 0 (3) fills
row 1. Item 3 (2) fits neither and opens row 2.

Both methods place the longest item first (Johnson 1973): `first-fit` into the first row that has
room, `best-fit` into the row that has the least room left afterwards. Under both rules, items of
one length go to the same row until it is full. So a row is searched once per run of equal lengths,
not once per item, and time is almost linear. Lengths are tokens; items are indices into the list of
lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

PACKING_METHODS = ("first-fit", "best-fit")


def pack(
    lengths: Sequence[int] | np.ndarray, capacity: int, method: str = "first-fit"
) -> tuple[np.ndarray, np.ndarray]:
    """(items [n], offsets [rows + 1]): row r holds `items[offsets[r] : offsets[r + 1]]`.

    Within a row the longest item comes first, equal ones in their order. Raises ValueError if an
    item is longer than a row, or has no token.
    """
    lengths_n = np.asarray(lengths, np.int64)
    if not len(lengths_n):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    order = np.argsort(-lengths_n, kind="stable")
    ordered = lengths_n[order]
    if ordered[0] > capacity:
        raise ValueError(f"item {order[0]} has {ordered[0]} tokens, and a row {capacity}")
    if ordered[-1] < 1:
        raise ValueError(f"item {order[-1]} has {ordered[-1]} tokens, and 1 is the least")
    # Runs of equal lengths: ordered [7 5 5 2] -> starts [0 1 3], counts [1 2 1]. `place` gives the
    # row and the number of items of each placement, in the same order: with rows [0 1 2 1] and
    # amounts [1 1 1 1] the items `order[0..3]` go to rows 0, 1, 2 and 1.
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] + 1))
    counts = np.diff(starts, append=len(ordered)).tolist()
    place = {"first-fit": _first_fit, "best-fit": _best_fit}[method]
    # Any two neighbouring rows hold more than one capacity together.
    max_rows = min(len(lengths_n), 2 * int(ordered.sum()) // capacity + 2)
    rows, amounts = place(ordered[starts].tolist(), counts, capacity, max_rows)
    row_of = np.repeat(rows, amounts)
    sizes = np.bincount(row_of)
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return order[np.argsort(row_of, kind="stable")], offsets


def _first_fit(
    values: list[int], counts: list[int], capacity: int, max_rows: int
) -> tuple[list[int], list[int]]:
    """(row, number of items) of each placement, in order.

    The first row with room is found in O(log rows) by a binary tree in an array: `room[leaves + i]`
    is the room of row i, and `room[n]` is the larger of `room[2n]` and `room[2n + 1]`. Four rows
    with room 1, 3, 8, 8:

        room  [-, 8, 3, 8, 1, 3, 8, 8]        a length of 2: node 1 -> 2 -> 4 has 1, so 5: row 1
    """
    leaves = 1 << (max_rows - 1).bit_length()
    room = [capacity] * (2 * leaves)
    rows, amounts = [], []
    for length, count in zip(values, counts, strict=True):
        while count:
            # Down to the first row with room: left if the left child has enough, else right.
            node = 1
            while node < leaves:
                node *= 2
                if room[node] < length:
                    node += 1
            fitting = min(room[node] // length, count)
            count -= fitting
            rows.append(node - leaves)
            amounts.append(fitting)
            room[node] -= fitting * length
            # Up again: the rooms above are the maximum of their children. If one does not change,
            # the rooms above it do not change either.
            while node > 1:
                left, right = room[node & ~1], room[node | 1]
                node >>= 1
                largest = left if left > right else right
                if room[node] == largest:
                    break
                room[node] = largest
    return rows, amounts


def _best_fit(
    values: list[int], counts: list[int], capacity: int, max_rows: int
) -> tuple[list[int], list[int]]:
    """Like `_first_fit`; among rows with equal room it takes the one that was changed last.

    Bit r of `open_rooms` is set if a row has room r. So the least room of at least `length` is the
    lowest bit that is left after shifting by `length`: rooms 1, 3 and 5 are the bits 101010, and
    for a length of 2 the shifted bits are 1010, lowest bit 1, so room 2 + 1 = 3.
    """
    open_rooms, opened = 0, 0
    rows_with: dict[int, list[int]] = {}
    rows, amounts = [], []
    for length, count in zip(values, counts, strict=True):
        while count:
            above = open_rooms >> length
            if above:
                # `x & -x` keeps the lowest bit: 1010 -> 10, whose bit_length - 1 is bit 1
                left = length + (above & -above).bit_length() - 1
                row = rows_with[left].pop()
                if not rows_with[left]:
                    open_rooms ^= 1 << left
            else:
                left, row, opened = capacity, opened, opened + 1
            fitting = min(left // length, count)
            count -= fitting
            rows.append(row)
            amounts.append(fitting)
            left -= fitting * length
            open_rooms |= 1 << left
            rows_with.setdefault(left, []).append(row)
    assert opened <= max_rows, (opened, max_rows)
    return rows, amounts


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """`pack` by first fit, as lists of items."""
    return as_lists(*pack(lengths, capacity))


def as_lists(items: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    """Rows of `pack` as lists of items."""
    flat, ends = items.tolist(), offsets.tolist()
    return [flat[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def spread(
    lengths: Sequence[int],
    capacity: int,
    num_rows: int,
    costs: Sequence[float] | None = None,
) -> list[list[int]] | None:
    """Spread items over `num_rows` rows: the costliest first, each into the cheapest row that has
    room (Graham 1969). Without `costs`, the lengths are the costs.

    Returns None if an item does not fit that way. Lengths [5, 4, 3, 3] over 2 rows of 8: item 0 to
    row 0, items 1 and 2 to row 1 (7 tokens), item 3 to row 0: [[0, 3], [1, 2]].
    """
    costs_n = np.asarray(lengths if costs is None else costs, np.float64)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0.0, row, 0) for row in range(num_rows)]  # cost, row, tokens
    for item in np.argsort(-costs_n, kind="stable").tolist():
        # Rows that are too full for this item are set aside and put back: they may take a shorter
        # one.
        length, full = int(lengths[item]), []
        while heap and heap[0][2] + length > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, row, used = heap[0]
        rows[row].append(item)
        heapq.heapreplace(heap, (cost + float(costs_n[item]), row, used + length))
        for entry in full:
            heapq.heappush(heap, entry)
    return rows


def pack_step(
    lengths: Sequence[int],
    capacity: int,
    multiple: int,
    costs: Sequence[float] | None = None,
    packed: list[list[int]] | None = None,
    method: str = "first-fit",
) -> list[list[int]]:
    """Pack one step's items into as few rows as possible, a multiple of `multiple` in number.

    `packed` are the rows of `pack` if they are known. With several ranks the items are spread by
    cost over that number of rows, so that all ranks have similar work. If that does not fit, the
    packed rows stay as they are. Rows are empty only then, or with fewer items than rows.
    """
    rows = as_lists(*pack(lengths, capacity, method)) if packed is None else packed
    # 3 rows and a multiple of 2 make 4 rows: every rank must run the same number of rows.
    num_rows = -(-max(len(rows), 1) // multiple) * multiple
    if multiple > 1 and lengths:
        rows = spread(lengths, capacity, num_rows, costs) or rows
    return rows + [[] for _ in range(num_rows - len(rows))]


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Deal rows to ranks: each gets the same number of rows, and a similar total cost.

    The costliest row goes first, each to the rank with the least cost among those that still need
    rows. A rank's rows are in ascending order. `len(costs)` must be a multiple of `num_ranks`.
    Costs [9, 5, 4, 1] for 2 ranks: row 0 to rank 0, rows 1 and 2 to rank 1, row 3 to rank 0.
    """
    share = len(costs) // num_ranks
    assert share * num_ranks == len(costs), (len(costs), num_ranks)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for row in np.argsort(-np.asarray(costs, np.float64), kind="stable").tolist():
        cost, rank = heapq.heappop(heap)
        ranks[rank].append(row)
        # A rank that has its share of rows leaves the heap, whatever its cost.
        if len(ranks[rank]) < share:
            heapq.heappush(heap, (cost + float(costs[row]), rank))
    return [sorted(rows) for rows in ranks]
