"""Steps of a fixed number of rows, if some groups need several rows (`data.oversized: split`).

A group that fits shares rows with others, as in RowBatches. Any other has rows of its own: its
bundles and parts, packed. Together with them it is a block of rows, and a block is in one step:

    rows_per_step 4; blocks in their order, by their number of rows   1 1 3 1 1 1
    step 0   1 1 . 1 1      the block of 3 rows finds 2, and goes to the next step
    step 1   3 1

Each block goes to the first step that has room. So only the last steps of an epoch may have fewer
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from megatron_prefix.data.steps.compositions.order import (
    Order,
    epoch_order,
    order_by_length,
    seeded,
)
from megatron_prefix.data.steps.compositions.row_batches import WINDOW
from megatron_prefix.data.steps.packing import as_lists, pack
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted


class Block(NamedTuple):
    """Rows that stay together: bundles as indices into those of `groups`, one group after
    another."""

    groups: np.ndarray
    rows: list[np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class PartBatches:
    """`rows_per_step` packed rows per step; see this module's head.

    The bundles of group g are `firsts[g]` to `firsts[g + 1]` of `tokens`, their lengths under
    `sharing`; none exceeds `capacity`. Raises InputError if a group needs more rows than a step
    has.
    """

    firsts: np.ndarray
    tokens: np.ndarray
    sharing: str
    capacity: int
    rows_per_step: int
    fingerprint: str
    seed: int
    window: int = WINDOW
    sort_by_length: bool = False
    method: str = "first-fit"
    order: Order | None = None
    """The order of each epoch, in which groups may be repeated; None for a permutation."""
    name_of: Callable[[int], str] = "group {}".format
    """A group in messages."""

    def __post_init__(self) -> None:
        for group in np.flatnonzero(self._lengths > self.capacity).tolist():
            rows = len(self._own_rows(group).rows)
            if rows > self.rows_per_step:
                raise InputError(
                    f"data.rows_per_step is {self.rows_per_step} and {self.name_of(group)} needs "
                    f"{counted(rows, 'row')} of data.row_capacity = "
                    f"{counted(self.capacity, 'token')}, which must be in one step: raise either, "
                    "or use data.global_batch_size"
                )

    def groups(self, step: int) -> np.ndarray:
        return np.concatenate([block.groups for block in self._blocks(step)])

    def packing(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(items, offsets) of the step: row r holds `items[offsets[r] : offsets[r + 1]]`, indices
        into the bundles of the step's groups, one group after another.

        Blocks of 3 and 2 bundles with the rows [0 1 2] and [1], [0]: rows [0 1 2], [4], [3].
        """
        rows, first = [], 0
        for block in self._blocks(step):
            rows += [row + first for row in block.rows]
            first += self._num_bundles(block.groups)
        sizes = [len(row) for row in rows]
        return np.concatenate(rows), np.cumsum([0, *sizes])

    def num_steps(self, epochs: int) -> int:
        return sum(self._steps_of(epoch) for epoch in range(epochs))

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of each group, [groups]."""
        sums = np.concatenate([[0], np.cumsum(self.tokens)])
        return sums[self.firsts[1:]] - sums[self.firsts[:-1]]

    def _num_bundles(self, groups: np.ndarray) -> int:
        return int((self.firsts[groups + 1] - self.firsts[groups]).sum())

    def _own_rows(self, group: int) -> Block:
        """The rows of a group that does not fit one."""
        tokens = self.tokens[self.firsts[group] : self.firsts[group + 1]]
        rows = as_lists(*pack(tokens, self.capacity, self.method))
        return Block(np.array([group]), [np.array(row) for row in rows])

    def _blocks(self, step: int) -> Sequence[Block]:
        epoch, first = 0, 0
        while step >= (last := first + self._steps_of(epoch)):
            epoch, first = epoch + 1, last
        return self._epoch(epoch)[step - first]

    @cache  # noqa: B019 (a run has one composition, alive as long as the run)
    def _steps_of(self, epoch: int) -> int:
        return len(self._epoch(epoch))

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> list[list[Block]]:
        """The blocks of each step of an epoch."""
        key = self.fingerprint, self.seed, epoch
        order = self.order(epoch) if self.order else epoch_order(len(self._lengths), *key)
        if self.sort_by_length:
            order = order_by_length(self._lengths, order)
        blocks = []
        for start in range(0, len(order), self.window):
            window = order[start : start + self.window]
            is_small = self._lengths[window] <= self.capacity
            small = window[is_small]
            for row in as_lists(*pack(self._lengths[small], self.capacity, self.method)):
                groups = small[row]
                blocks.append(Block(groups, [np.arange(self._num_bundles(groups))]))
            blocks += [self._own_rows(group) for group in window[~is_small].tolist()]
        if not self.sort_by_length:
            blocks = [blocks[i] for i in seeded("rows", *key).permutation(len(blocks))]
        steps = in_steps(blocks, self.rows_per_step)
        if self.sort_by_length:
            steps = [steps[i] for i in seeded("steps", *key).permutation(len(steps))]
        return steps


def in_steps(blocks: Sequence[Block], rows_per_step: int) -> list[list[Block]]:
    """Each block in the first step that has room for its rows."""
    steps: list[list[Block]] = []
    room: list[int] = []
    first_open = 0
    for block in blocks:
        size = len(block.rows)
        index = next((i for i in range(first_open, len(steps)) if room[i] >= size), len(steps))
        if index == len(steps):
            steps.append([])
            room.append(rows_per_step)
        steps[index].append(block)
        room[index] -= size
        while first_open < len(steps) and not room[first_open]:
            first_open += 1
    return steps
