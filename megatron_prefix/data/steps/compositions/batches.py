"""Steps of a fixed number of groups: shuffled, sorted by length, or in the data set's order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from megatron_prefix.data.steps.compositions.order import (
    Order,
    epoch_order,
    order_by_length,
    seeded,
)


class Composition(Protocol):
    """Which groups make a step."""

    def groups(self, step: int) -> np.ndarray:
        """Group indices of step `step`, counted from 0."""

    def num_steps(self, epochs: int) -> int:
        """Number of steps that `epochs` passes over the data take."""


@dataclass(frozen=True)
class GroupBatches:
    """`batch_size` groups per step from one permutation per epoch; a step may span two epochs.

    With 5 groups and batches of 2, epochs [4 0 2 1 3] and [1 3 0 4 2] give the steps
    [4 0] [2 1] [3 1] [3 0] [4 2].
    """

    num_groups: int
    batch_size: int
    fingerprint: str
    seed: int
    limit: int | None = None
    """Epochs after which the groups end, which may cut the last step. None: steps never end."""
    order: Order | None = None
    """The order of each epoch, which has `num_groups` entries; None for a permutation."""

    def groups(self, step: int) -> np.ndarray:
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        if self.limit is not None:
            stop = min(stop, self.limit * self.num_groups)
        parts = []
        # 5 groups, batches of 2, step 2: entries 4 and 5 of the endless order, which are the last
        # of epoch 0 and the first of epoch 1
        while start < stop:
            epoch, offset = divmod(start, self.num_groups)
            part = self._epoch(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def num_steps(self, epochs: int) -> int:
        return -(-self.num_groups * epochs // self.batch_size)

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> np.ndarray:
        if self.order is not None:
            return self.order(epoch)
        return epoch_order(self.num_groups, self.fingerprint, self.seed, epoch)


@dataclass(frozen=True, eq=False)
class SortedBatches:
    """`batch_size` groups of similar length per step (batch sorting), from short to long.

    An epoch's groups are sorted by length and cut into steps, and the steps are permuted. If
    `batch_size` does not divide the groups, the step with the longest groups is the small one.
    """

    lengths: np.ndarray
    """Tokens of each group as a tree, [groups]: all sharing modes see the same steps."""
    batch_size: int
    fingerprint: str
    seed: int
    order: Order | None = None

    def groups(self, step: int) -> np.ndarray:
        # 7 groups in batches of 3: the sorted steps have 3, 3 and 1 groups. With steps [2 0 1] the
        # epoch begins with the longest group, alone.
        epoch, offset = divmod(step, self.num_steps(1))
        order, steps = self._epoch(epoch)
        start = int(steps[offset]) * self.batch_size
        return order[start : start + self.batch_size]

    def num_steps(self, epochs: int) -> int:
        num_groups = len(self.lengths if self.order is None else self.order(0))
        return epochs * -(-num_groups // self.batch_size)

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        key = self.fingerprint, self.seed, epoch
        order = self.order(epoch) if self.order else epoch_order(len(self.lengths), *key)
        steps = seeded("steps", *key).permutation(-(-len(order) // self.batch_size))
        return order_by_length(self.lengths, order), steps


@dataclass(frozen=True)
class InOrder:
    """All groups once, in the data set's order, `batch_size` per step."""

    num_groups: int
    batch_size: int

    def groups(self, step: int) -> np.ndarray:
        stop = min((step + 1) * self.batch_size, self.num_groups)
        return np.arange(step * self.batch_size, stop)

    def num_steps(self, epochs: int) -> int:
        return epochs * -(-self.num_groups // self.batch_size)
