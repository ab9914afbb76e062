"""Items of known lengths -> rows of bounded length; an item is never split.

    first_fit_decreasing([3, 7, 5, 2], capacity=8) -> [[1], [2, 0], [3]]

Both methods place the longest item first (Johnson 1973): `first-fit` into the first row that has
room, `best-fit` into the row that it leaves the least room in. Items of one length go to the same
row until it is full, under either rule, so that what is searched for is a row a run of equal
lengths: near-linear time. Lengths are tokens; items are indices into the list of lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

PACKING_METHODS = ("first-fit", "best-fit")


def pack(
    lengths: Sequence[int], capacity: int, method: str = "first-fit"
) -> tuple[np.ndarray, np.ndarray]:
    """(items [n], offsets [rows + 1]): row r holds `items[offsets[r] : offsets[r + 1]]`.

    Within a row the longest item comes first, equal ones in their order. Raises ValueError where
    an item is longer than a row, or has no token.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    if ordered[0] > capacity:
        raise ValueError(f"item {order[0]} has {ordered[0]} tokens, a row {capacity}")
    if ordered[-1] < 1:
        raise ValueError(f"item {order[-1]} has {ordered[-1]} tokens")
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] + 1))
    counts = np.diff(starts, append=len(ordered)).tolist()
    place = {"first-fit": _first_fit, "best-fit": _best_fit}[method]
    # Any two rows that follow one another hold more than one capacity together.
    max_rows = min(len(lengths), 2 * int(ordered.sum()) // capacity + 2)
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

    The first row with room is found in O(log rows): `room[1]` is the root of a tree of the
    largest room in each half, `room[leaves + i]` belongs to row i.
    """
    leaves = 1 << (max_rows - 1).bit_length()
    room = [capacity] * (2 * leaves)
    rows, amounts = [], []
    for length, count in zip(values, counts, strict=True):
        while count:
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
            while node > 1:
                here, beside = room[node], room[node ^ 1]
                node >>= 1
                largest = here if here > beside else beside
                if room[node] == largest:
                    break
                room[node] = largest
    return rows, amounts


def _best_fit(
    values: list[int], counts: list[int], capacity: int, max_rows: int
) -> tuple[list[int], list[int]]:
    """As `_first_fit`; among rows with equal room, the one that was touched last.

    Bit r of `open_rooms` says whether a row has room r, so the least room of at least a length
    is the lowest bit left of a shift.
    """
    open_rooms, opened = 0, 0
    rows_with: dict[int, list[int]] = {}
    rows, amounts = [], []
    for length, count in zip(values, counts, strict=True):
        while count:
            above = open_rooms >> length
            if above:
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
    """Place the costliest item first, each into the cheapest of `num_rows` rows that has room
    (Graham 1969). `costs` are the lengths where not given.

    Returns None where an item does not fit that way.
    """
    costs = np.asarray(lengths if costs is None else costs, np.float64)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0.0, row, 0) for row in range(num_rows)]  # cost, row, tokens
    for item in np.argsort(-costs, kind="stable").tolist():
        length, full = int(lengths[item]), []
        while heap and heap[0][2] + length > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, row, used = heap[0]
        rows[row].append(item)
        heapq.heapreplace(heap, (cost + float(costs[item]), row, used + length))
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
    """Pack one step's items into as few rows as a multiple of `multiple` allows.

    `packed` are the rows of `pack` where they are known. With several ranks the items are spread
    by cost over that many rows, so that all ranks have like work; where that does not fit, the
    packed rows stay as they are. Rows are empty only then, or with fewer items than rows.
    """
    rows = as_lists(*pack(lengths, capacity, method)) if packed is None else packed
    num_rows = -(-max(len(rows), 1) // multiple) * multiple
    if multiple > 1 and lengths:
        rows = spread(lengths, capacity, num_rows, costs) or rows
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
