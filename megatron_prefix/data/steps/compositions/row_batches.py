"""Steps of a fixed number of rows: groups are packed into rows before steps are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from megatron_prefix.data.steps.compositions.order import (
    Order,
    epoch_order,
    order_by_length,
    seeded,
)
from megatron_prefix.data.steps.packing import pack
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

WINDOW = 8192
"""Groups packed together. Each window has one row that is not full: less than 1 % of its rows."""


@dataclass(frozen=True, eq=False)
class EpochRows:
    """Rows of one epoch: row r holds `groups[offsets[r] : offsets[r + 1]]`."""

    groups: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        return self.groups[self.offsets[index] : self.offsets[index + 1]]

    def take(self, order: np.ndarray) -> EpochRows:
        """The same rows in another order.

        groups [a b c d e f], offsets [0 2 3 6], order [2 0 1]: sizes become [3 2 1] and offsets
        [0 3 5 6]. Entry i of the new rows comes from i + (old start - new start) of its row: shifts
        [3 3 3 -3 -3 -3], so indices [3 4 5 0 1 2], so groups [d e f a b c].
        """
        sizes = np.diff(self.offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        index = np.arange(len(self.groups)) + np.repeat(self.offsets[order] - offsets[:-1], sizes)
        return EpochRows(self.groups[index], offsets)


@dataclass(frozen=True, eq=False)
class RowBatches:
    """`rows_per_step` packed rows per step.

    An epoch's groups are permuted and packed in windows of `window` groups; then the rows of all
    windows are permuted. A row holds whole groups, so a group is in one step only. The last step
    has the rows that remain. With `sort_by_length` the groups are sorted by length before they
    are packed, and steps are permuted instead of rows.
    """

    lengths: np.ndarray
    """Tokens of each group under the sharing mode that is packed, [groups]."""
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
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > self.capacity:
            raise InputError(
                f"data.row_capacity is {self.capacity} and {self.name_of(longest)} has "
                f"{counted(self.lengths[longest], 'token')}; with data.rows_per_step a row holds "
                "whole groups: raise it, set data.oversized: split, build with a smaller "
                "--max-length, or use data.global_batch_size"
            )

    def rows(self, step: int) -> list[np.ndarray]:
        """The groups of each row of the step."""
        # Epochs of 3 and 4 steps: step 5 is step 2 of epoch 1, and `first` is 3.
        epoch, first = 0, 0
        while step >= (last := first + self._steps_of(epoch)):
            epoch, first = epoch + 1, last
        packed, steps = self._epoch(epoch)
        start = int(steps[step - first]) * self.rows_per_step
        stop = min(start + self.rows_per_step, len(packed))
        return [packed.row(index) for index in range(start, stop)]

    def groups(self, step: int) -> np.ndarray:
        return np.concatenate(self.rows(step))

    def num_steps(self, epochs: int) -> int:
        return sum(self._steps_of(epoch) for epoch in range(epochs))

    @cache  # noqa: B019 (a run has one composition, alive as long as the run)
    def _steps_of(self, epoch: int) -> int:
        """Steps of one epoch. Each epoch is packed again, so epochs may differ by a row."""
        return len(self._epoch(epoch)[1])

    def fill(self, epoch: int = 0) -> float:
        """Tokens over capacity, over all rows of an epoch, at most 1."""
        rows = self._epoch(epoch)[0]
        return float(self.lengths[rows.groups].sum() / (self.capacity * len(rows)))

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> tuple[EpochRows, np.ndarray]:
        """The epoch's rows, and the order in which its steps are taken."""
        key = self.fingerprint, self.seed, epoch
        order = self.order(epoch) if self.order else epoch_order(len(self.lengths), *key)
        if self.sort_by_length:
            order = order_by_length(self.lengths, order)
        groups, sizes = [], []
        for start in range(0, len(order), self.window):
            # Items are numbered within their window: window [2 1] and items [1 0] are groups [1 2].
            window = order[start : start + self.window]
            items, offsets = pack(self.lengths[window], self.capacity, self.method)
            groups.append(window[items])
            sizes.append(np.diff(offsets))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        rows = EpochRows(np.concatenate(groups), offsets)
        num_steps = -(-len(rows) // self.rows_per_step)
        if self.sort_by_length:
            return rows, seeded("steps", *key).permutation(num_steps)
        return rows.take(seeded("rows", *key).permutation(len(rows))), np.arange(num_steps)
