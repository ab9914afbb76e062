"""Settings -> composition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_prefix.data.steps.compositions.batches import Composition, SortedBatches
from megatron_prefix.data.steps.compositions.mixtures import RepeatedSets, WeightedSets
from megatron_prefix.data.steps.compositions.part_batches import PartBatches
from megatron_prefix.data.steps.compositions.record_batches import group_batches
from megatron_prefix.data.steps.compositions.row_batches import RowBatches
from megatron_prefix.data.steps.sharing import all_parts, group_firsts, group_lengths
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Everything but the data set that decides which groups share a step and a row.

    The names are those of the data section, which has either `global_batch_size` or
    `rows_per_step`. `epochs` is None if a run counts steps.
    """

    seed: int
    sharing: str = "tree"
    row_capacity: int | None = None
    global_batch_size: int | None = None
    rows_per_step: int | None = None
    sort_by_length: bool = False
    packing_method: str = "first-fit"
    oversized: str = "error"
    epochs: int | None = None
    weights: tuple[float, ...] | None = None
    """Shares of joined data sets in every step, see mixtures.py; needs `global_batch_size`."""
    set_epochs: tuple[float, ...] | None = None
    """How often each of joined data sets comes in the one epoch of the run."""

    def composition(self, dataset: PreferenceDataset) -> Composition:
        """The composition for these settings. Raises InputError if `dataset` does not fit them."""
        sizes = tuple(len(part) for part in dataset.parts)
        if self.weights is not None:
            return self._weighted(dataset, sizes, self.weights)
        order = None
        if self.set_epochs is not None:
            order = RepeatedSets(sizes, self.set_epochs, dataset.fingerprint, self.seed)
        if self.rows_per_step is not None:
            return self._of_rows(dataset, order, self.rows_per_step)
        assert self.global_batch_size is not None, "global_batch_size or rows_per_step is needed"
        if not self.sort_by_length:
            return group_batches(dataset, self.global_batch_size, self.seed, self.epochs, order)
        if (dataset.group_num_records[:] != 1).any():
            raise InputError(
                f"data.sort_by_length is true and {dataset.prefix} was built with --merge-prompts, "
                "so its groups hold several records: set data.rows_per_step instead of "
                "data.global_batch_size"
            )
        lengths = dataset.groups_num_tokens()
        return SortedBatches(lengths, self.global_batch_size, dataset.fingerprint, self.seed, order)

    def group_counts(self, sizes: tuple[int, ...], fingerprint: str, num_steps: int) -> np.ndarray:
        """How often each group comes in a plan of `num_steps` steps, for joined data sets of
        `sizes` groups."""
        if self.set_epochs is not None:
            groups = RepeatedSets(sizes, self.set_epochs, fingerprint, self.seed)(0)
            return np.bincount(groups, minlength=sum(sizes))
        if self.weights is None:
            return np.full(sum(sizes), self.epochs)
        batch_size = self.global_batch_size
        assert batch_size is not None, "weights share out the groups of a step"
        composition = WeightedSets(sizes, self.weights, batch_size, fingerprint, self.seed)
        counts = np.zeros(sum(sizes), np.int64)
        for step in range(num_steps):
            counts += np.bincount(composition.groups(step), minlength=len(counts))
        return counts

    def _of_rows(
        self, dataset: PreferenceDataset, order: RepeatedSets | None, rows_per_step: int
    ) -> RowBatches | PartBatches:
        assert self.row_capacity is not None, "rows_per_step needs row_capacity"
        lengths = group_lengths(dataset, self.sharing)
        if self.oversized == "split" and lengths.max() > self.row_capacity:
            group, tokens, _ = all_parts(dataset, self.sharing, self.row_capacity)
            return PartBatches(
                firsts=group_firsts(group, len(dataset)),
                tokens=tokens,
                sharing=self.sharing,
                capacity=self.row_capacity,
                rows_per_step=rows_per_step,
                fingerprint=dataset.fingerprint,
                seed=self.seed,
                sort_by_length=self.sort_by_length,
                method=self.packing_method,
                order=order,
                name_of=dataset.place,
            )
        return RowBatches(
            lengths,
            self.row_capacity,
            rows_per_step,
            dataset.fingerprint,
            self.seed,
            sort_by_length=self.sort_by_length,
            method=self.packing_method,
            order=order,
            name_of=dataset.place,
        )

    def _weighted(
        self, dataset: PreferenceDataset, sizes: tuple[int, ...], weights: tuple[float, ...]
    ) -> WeightedSets:
        batch_size = self.global_batch_size
        assert batch_size is not None, "weights share out the groups of a step"
        for part in dataset.parts:
            if (part.group_num_records[:] != 1).any():
                raise InputError(
                    f"data.train has weights, which share out groups, and {part.prefix} was built "
                    "with --merge-prompts, so its groups hold several records: give epochs instead"
                )
        return WeightedSets(sizes, weights, batch_size, dataset.fingerprint, self.seed)
