"""Batches counted in source records, for data sets whose groups hold several of them.

`build --merge-prompts` makes groups of different numbers of records. A step still stands for
`batch_size` records: laid end to end in the order of an epoch, groups cover the records' axis,
and a group belongs to the step in whose window it begins.

    sizes in the epoch's order [2, 1, 3, 1, 1], batches of 4
    records  0 1 | 2 | 3 4 5 | 6 | 7        groups begin at 0, 2, 3, 6, 7
    steps    [0, 4): groups 0, 1, 2         [4, 8): groups 3, 4

No group is cut, so steps differ by less than the largest group, and their mean is `batch_size`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_prefix.data.steps.composition import Composition, GroupBatches, seeded
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError


def group_batches(
    dataset: PreferenceDataset, batch_size: int, seed: int, epochs: int | None = None
) -> Composition:
    """The composition that `data.global_batch_size` asks for, counted in source records."""
    sizes = np.asarray(dataset.group_num_records, np.int64)
    if (sizes == 1).all():
        return GroupBatches(len(dataset), batch_size, dataset.fingerprint, seed, epochs)
    largest = int(sizes.argmax())
    if sizes[largest] > batch_size:
        raise InputError(
            f"{dataset.prefix}: group {largest} holds {sizes[largest]} records of one prompt, and "
            f"data.global_batch_size is {batch_size}: raise it, or build without --merge-prompts"
        )
    return RecordBatches(sizes, batch_size, dataset.fingerprint, seed, epochs)


@dataclass(frozen=True, eq=False)
class RecordBatches:
    """`batch_size` source records a step, to within a group; see this module's head.

    `sizes` are records a group, [groups], none above `batch_size`. The order of an epoch is that
    of `GroupBatches`.
    """

    sizes: np.ndarray
    batch_size: int
    fingerprint: str
    seed: int
    limit: int | None = None
    """Epochs after which there are no more groups; without it steps run on for ever."""

    def groups(self, step: int) -> np.ndarray:
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        total = int(self.sizes.sum())
        if self.limit is not None:
            stop = min(stop, self.limit * total)
        parts = [np.zeros(0, np.int64)]
        for epoch in range(start // total, -(-stop // total)):
            order, begins = self._epoch(epoch)
            inside = np.searchsorted(begins, [start - epoch * total, stop - epoch * total])
            parts.append(order[slice(*inside)])
        return np.concatenate(parts)

    def num_steps(self, epochs: int) -> int:
        if not epochs:
            return 0
        last = self._epoch(epochs - 1)[1][-1] + (epochs - 1) * self.sizes.sum()
        return int(last) // self.batch_size + 1

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups in the epoch's order, and the record at which each begins."""
        order = seeded("order", self.fingerprint, self.seed, epoch).permutation(len(self.sizes))
        sizes = self.sizes[order]
        return order, np.cumsum(sizes) - sizes
