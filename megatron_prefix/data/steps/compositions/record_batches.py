"""Steps counted in source records, for data sets whose groups hold several records.

`build --merge-prompts` makes groups of different numbers of records. A step is still `batch_size`
records: put end to end in an epoch's order, the groups cover a line of records, and a group belongs
to the step in whose interval it begins.

    sizes in the epoch's order [2, 1, 3, 1, 1], batches of 4
    records  0 1 | 2 | 3 4 5 | 6 | 7        groups begin at 0, 2, 3, 6, 7
    steps    [0, 4): groups 0, 1, 2         [4, 8): groups 3, 4

No group is cut. So steps differ by less than the largest group, and their mean is `batch_size`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from megatron_prefix.data.steps.compositions.batches import Composition, GroupBatches
from megatron_prefix.data.steps.compositions.mixtures import RepeatedSets
from megatron_prefix.data.steps.compositions.order import Order, epoch_order
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted


def group_batches(
    dataset: PreferenceDataset,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    order: RepeatedSets | None = None,
) -> Composition:
    """The composition for `data.global_batch_size`, which counts source records."""
    sizes = np.asarray(dataset.group_num_records, np.int64)
    if (sizes == 1).all():
        num_groups = len(dataset) if order is None else len(order)
        return GroupBatches(num_groups, batch_size, dataset.fingerprint, seed, epochs, order)
    largest = int(sizes.argmax())
    if sizes[largest] > batch_size:
        raise InputError(
            f"data.global_batch_size is {batch_size} and {dataset.place(largest)} holds "
            f"{counted(sizes[largest], 'record')} of one prompt: raise it, or build without "
            "--merge-prompts"
        )
    return RecordBatches(sizes, batch_size, dataset.fingerprint, seed, epochs, order)


@dataclass(frozen=True, eq=False)
class RecordBatches:
    """`batch_size` source records per step, up to whole groups; see this module's head.

    `sizes` are records per group, [groups], none above `batch_size`. An epoch has the order of
    `GroupBatches`.
    """

    sizes: np.ndarray
    batch_size: int
    fingerprint: str
    seed: int
    limit: int | None = None
    """Epochs after which there are no more groups. None: steps never end."""
    order: Order | None = None
    """The order of each epoch; None for a permutation."""

    def groups(self, step: int) -> np.ndarray:
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        total = self._total
        if self.limit is not None:
            stop = min(stop, self.limit * total)
        # 8 records per epoch, batches of 3, step 2: records 6 to 8. With the groups of this
        # module's head, groups 3 and 4 begin there in epoch 0, and the first group of epoch 1.
        parts = [np.zeros(0, np.int64)]
        for epoch in range(start // total, -(-stop // total)):
            order, begins = self._epoch(epoch)
            first, last = np.searchsorted(begins, [start - epoch * total, stop - epoch * total])
            parts.append(order[first:last])
        return np.concatenate(parts)

    def num_steps(self, epochs: int) -> int:
        if not epochs:
            return 0
        last = self._epoch(epochs - 1)[1][-1] + (epochs - 1) * self._total
        return int(last) // self.batch_size + 1

    @cached_property
    def _total(self) -> int:
        """Records of an epoch."""
        return int(self.sizes.sum() if self.order is None else self.sizes[self.order(0)].sum())

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups in the epoch's order, and the record at which each begins."""
        if self.order is not None:
            order = self.order(epoch)
        else:
            order = epoch_order(len(self.sizes), self.fingerprint, self.seed, epoch)
        sizes = self.sizes[order]
        return order, np.cumsum(sizes) - sizes
