"""Compositions: which groups make a step, as a function of (data set fingerprint, seed, step).

    GroupBatches    `global_batch_size` groups off one permutation an epoch
    SortedBatches   the same number of groups of like length, the order of steps permuted
    RowBatches      `rows_per_step` rows of seeded windows that were packed first
    packed plan     any of these written to files by `pack`, see plan_file.py

Nothing here depends on how many ranks there are, and nothing has a state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import numpy as np

from megatron_prefix.data.steps.packing import pack
from megatron_prefix.data.steps.sharing import group_lengths
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError

WINDOW = 8192
"""Groups packed together by `RowBatches`: enough that the one unfilled row a window is < 1 %."""


class Composition(Protocol):
    """Which groups make a step."""

    def groups(self, step: int) -> np.ndarray:
        """Group indices of step `step`, counted from 0."""

    def num_steps(self, epochs: int) -> int:
        """Steps that `epochs` passes over the data take."""


def seeded(*key: object) -> np.random.Generator:
    """A random stream that is a function of `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@lru_cache(maxsize=2)
def _permutation(num_groups: int, fingerprint: str, seed: int, epoch: int) -> np.ndarray:
    return seeded("order", fingerprint, seed, epoch).permutation(num_groups)


def _by_length(lengths: np.ndarray, fingerprint: str, seed: int, epoch: int) -> np.ndarray:
    """Groups from short to long, equal ones in the epoch's seeded order."""
    order = _permutation(len(lengths), fingerprint, seed, epoch)
    return order[np.argsort(lengths[order], kind="stable")]


@dataclass(frozen=True)
class GroupBatches:
    """`batch_size` groups a step off one permutation an epoch, running on over epochs' ends.

    With 5 groups and batches of 2, epochs [4 0 2 1 3] and [1 3 0 4 2] give the steps
    [4 0] [2 1] [3 1] [3 0] [4 2].
    """

    num_groups: int
    batch_size: int
    fingerprint: str
    seed: int
    limit: int | None = None
    """Epochs after which the last step is cut short; without it steps run on for ever."""

    def groups(self, step: int) -> np.ndarray:
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        if self.limit is not None:
            stop = min(stop, self.limit * self.num_groups)
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_groups)
            part = self._order(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def num_steps(self, epochs: int) -> int:
        return -(-self.num_groups * epochs // self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        return _permutation(self.num_groups, self.fingerprint, self.seed, epoch)


@dataclass(frozen=True, eq=False)
class SortedBatches:
    """`batch_size` groups of like length a step (batch sorting), from short to long within it.

    An epoch's groups are sorted by length, cut into steps, and the steps permuted. The step
    with the longest groups takes what a multiple of `batch_size` leaves, in every epoch.
    """

    lengths: np.ndarray
    """Tokens of each group as a tree, [groups]: all sharing modes see the same steps."""
    batch_size: int
    fingerprint: str
    seed: int

    def groups(self, step: int) -> np.ndarray:
        epoch, offset = divmod(step, self.num_steps(1))
        order, steps = self._epoch(epoch)
        start = int(steps[offset]) * self.batch_size
        return order[start : start + self.batch_size]

    def num_steps(self, epochs: int) -> int:
        return epochs * -(-len(self.lengths) // self.batch_size)

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = _by_length(self.lengths, self.fingerprint, self.seed, epoch)
        steps = seeded("steps", self.fingerprint, self.seed, epoch).permutation(self.num_steps(1))
        return order, steps


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of one epoch: row r holds `groups[offsets[r] : offsets[r + 1]]`."""

    groups: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        return self.groups[self.offsets[index] : self.offsets[index + 1]]

    def take(self, order: np.ndarray) -> PackedRows:
        """The same rows in another order."""
        sizes = np.diff(self.offsets)[order]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        index = np.arange(len(self.groups)) + np.repeat(self.offsets[order] - offsets[:-1], sizes)
        return PackedRows(self.groups[index], offsets)


@dataclass(frozen=True, eq=False)
class RowBatches:
    """`rows_per_step` packed rows a step.

    An epoch's groups are permuted, packed in windows of `window` groups, and the rows of all
    windows are permuted. A row holds whole groups, so a group is in one step only; the last step
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

    def __post_init__(self) -> None:
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > self.capacity:
            raise InputError(
                f"group {longest} has {self.lengths[longest]} tokens and data.row_capacity is "
                f"{self.capacity}; with data.rows_per_step a row holds whole groups: raise it, "
                "build with a smaller --max-length, or use data.global_batch_size"
            )

    def rows(self, step: int) -> list[np.ndarray]:
        """The groups of each row of the step."""
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
        """Each epoch is packed anew, so that epochs may differ by a row."""
        return len(self._epoch(epoch)[1])

    def fill(self, epoch: int = 0) -> float:
        """Tokens over capacity, over all rows of an epoch, at most 1."""
        return float(self.lengths.sum() / (self.capacity * len(self._epoch(epoch)[0])))

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> tuple[PackedRows, np.ndarray]:
        """The epoch's rows, and the order in which its steps are taken."""
        key = self.fingerprint, self.seed, epoch
        if self.sort_by_length:
            order = _by_length(self.lengths, *key)
        else:
            order = _permutation(len(self.lengths), *key)
        groups, sizes = [], []
        for start in range(0, len(order), self.window):
            window = order[start : start + self.window]
            items, offsets = pack(self.lengths[window], self.capacity, self.method)
            groups.append(window[items])
            sizes.append(np.diff(offsets))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        rows = PackedRows(np.concatenate(groups), offsets)
        num_steps = -(-len(rows) // self.rows_per_step)
        if self.sort_by_length:
            return rows, seeded("steps", *key).permutation(num_steps)
        return rows.take(seeded("rows", *key).permutation(len(rows))), np.arange(num_steps)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Everything beside the data set that decides which groups share a step and a row.

    Named as the data section has them; `epochs` is None where a run counts steps.
    """

    seed: int
    sharing: str = "tree"
    row_capacity: int | None = None
    global_batch_size: int | None = None
    rows_per_step: int | None = None
    sort_by_length: bool = False
    packing_method: str = "first-fit"
    epochs: int | None = None

    def composition(self, dataset: PreferenceDataset) -> Composition:
        """The composition that these settings ask for. Raises InputError."""
        if self.rows_per_step:
            return RowBatches(
                group_lengths(dataset, self.sharing),
                self.row_capacity,
                self.rows_per_step,
                dataset.fingerprint,
                self.seed,
                sort_by_length=self.sort_by_length,
                method=self.packing_method,
            )
        if not self.sort_by_length:
            from megatron_prefix.data.steps.record_batches import group_batches

            return group_batches(dataset, self.global_batch_size, self.seed, self.epochs)
        if (dataset.group_num_records[:] != 1).any():
            raise InputError(
                f"{dataset.prefix} was built with --merge-prompts, so that groups hold several "
                "records: sort_by_length needs data.rows_per_step there"
            )
        key = self.global_batch_size, dataset.fingerprint, self.seed
        return SortedBatches(dataset.groups_num_tokens(), *key)
