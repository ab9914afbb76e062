"""Sampler: the rows of each step on each data-parallel rank.

1. A **composition** (compositions/) says which groups share step s: a pure function of (data set
   fingerprint, seed, step).
2. The **sampler** cuts the step's groups into bundles under its `sharing` mode, packs them into
   rows, adds empty rows until all ranks have the same number, and deals rows to ranks by cost.
3. The step's normaliser is known here, before anything is computed.

There is no iterator state: to resume at step s, or on another number of ranks, call `step(s)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from megatron_prefix.data.steps.collate import (
    MicroBatch,
    Targets,
    collate_packed,
    collate_padded,
    tree_targets,
)
from megatron_prefix.data.steps.compositions import Composition, PartBatches, RowBatches
from megatron_prefix.data.steps.cost import CostModel, bundle_work
from megatron_prefix.data.steps.denominators import step_denominators
from megatron_prefix.data.steps.packed import PackedSteps
from megatron_prefix.data.steps.packing import as_lists, deal, pack_step
from megatron_prefix.data.steps.parts import Limits
from megatron_prefix.data.steps.rows import group_rows, row_items, with_row_images
from megatron_prefix.data.steps.sharing import Bundle, all_bundles, bundles_of, num_sequences
from megatron_prefix.data.steps.step_columns import StepColumns, step_columns
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

Row = list[Bundle]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step: `rows[rank]` are the rows of that rank, each a list of bundles.

    `denominators` is what the loss of each unit is divided by, over the whole step; `costs[rank]`
    is the cost of that rank's rows, in FLOP of a forward pass, or in tokens without a cost model.
    """

    step: int
    groups: np.ndarray
    rows: list[list[Row]]
    denominators: dict[str, float]
    num_pairs: int
    costs: list[float]
    is_divided: bool = False
    """Whether the responses of a pair or set lie in several parts (`data.oversized: split`)."""
    repeated_tokens: int = 0
    """Tokens of parts that an earlier part of the same bundle has too."""

    @property
    def bundles(self) -> list[Bundle]:
        """All bundles, in an order that does not depend on rows or ranks."""
        bundles = [bundle for rank in self.rows for row in rank for bundle in row]
        return sorted(bundles, key=lambda bundle: (bundle.slot, bundle.item))


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Steps of one data set under one sharing mode, for `num_ranks` data-parallel ranks.

    Row lengths are rounded up to `row_multiple` (tensor x context parallel size), and the rows per
    rank to `count_multiple` (the pipeline size under virtual pipelining). With `micro_batch_size`,
    a row is not packed but holds that many padded sequences. `targets` are what the model predicts
    of each tree. Rows are dealt so that ranks have similar `cost`; without it, similar tokens.
    Raises InputError before the first step if any bundle of the data set does not fit; with
    `oversized = "split"` such a bundle is cut into parts instead, and only a path must fit.
    """

    dataset: PreferenceDataset
    composition: Composition
    sharing: str = "tree"
    weighting: str = "pair"
    row_capacity: int | None = None
    micro_batch_size: int | None = None
    num_ranks: int = 1
    row_multiple: int = 1
    count_multiple: int = 1
    targets: Targets = tree_targets
    packing_method: str = "first-fit"
    cost: CostModel | None = None
    oversized: str = "error"
    pads_to_capacity: bool = False
    """Whether all packed rows have the same length: the capacity, rounded up to `row_multiple`."""
    with_attributes: bool = False
    """Rows have the responses' attributes, which then are the labels of the step."""

    def __post_init__(self) -> None:
        if not (self.row_capacity or self.micro_batch_size):
            raise ValueError("a sampler needs row_capacity (tokens) or micro_batch_size")
        if not isinstance(self.composition, PackedSteps):  # packed rows fit their capacity
            self._check_fit()

    @property
    def length_multiple(self) -> int:
        """The length of every row is a multiple of this; of at most 10 tokens in multiples of 4: 4,
        or 12 if all rows have the same length."""
        if not self.pads_to_capacity or self.row_capacity is None:
            return self.row_multiple
        return -(-self.row_capacity // self.row_multiple) * self.row_multiple

    @property
    def limits(self) -> Limits:
        """What a bundle may have before it is cut."""
        return Limits.of(self.oversized, self.sharing, self.row_capacity, self.micro_batch_size)

    def first_divided(self) -> int | None:
        """The first group that has a bundle in parts, in the data set's order."""
        groups: Iterable[int] = range(len(self.dataset))
        if self.limits.tokens is not None:
            group, _, tokens = all_bundles(self.dataset, self.sharing)
            groups = np.unique(group[tokens > self.limits.tokens]).tolist()
        return next((g for g in groups if any(b.part for b in self._bundles([g]))), None)

    def _check_fit(self) -> None:
        if self.oversized == "split":
            self._check_paths()
            return
        group, _, tokens = all_bundles(self.dataset, self.sharing)
        if self.micro_batch_size:
            self._check_sequences(group, self.micro_batch_size)
            if self.sharing in ("none", "response"):
                tokens = np.asarray(self.dataset.response_lengths, np.int64)
                group = np.repeat(
                    np.arange(len(self.dataset)), np.diff(self.dataset.group_responses)
                )
        worst = int(tokens.argmax())
        if self.row_capacity and tokens[worst] > self.row_capacity:
            unit = "one sequence" if self.micro_batch_size else "one row"
            is_path = self.micro_batch_size and self.sharing in ("none", "response")
            split = "" if is_path else "set data.oversized: split, "
            raise InputError(
                f"data.row_capacity is {self.row_capacity} and {self.dataset.place(group[worst])} "
                f"needs {counted(tokens[worst], 'token')} in {unit} under data.sharing: "
                f"{self.sharing}: raise it, {split}or build with a smaller --max-length"
            )

    def _check_paths(self) -> None:
        """Refuse responses that do not fit alone. Those without a pair do not run under `none` and
        `pair`."""
        if self.row_capacity is None:
            return
        lengths = np.array(self.dataset.response_lengths, np.int64)
        firsts = np.asarray(self.dataset.group_responses)
        if self.sharing in ("none", "pair"):
            group = np.repeat(np.arange(len(self.dataset)), np.diff(self.dataset.group_pairs))
            is_run = np.zeros(len(lengths), bool)
            sides = np.asarray(self.dataset.pair_responses, np.int64) + firsts[group][:, None]
            is_run[sides] = True
            lengths[~is_run] = 0
        worst = int(lengths.argmax())
        if lengths[worst] > self.row_capacity:
            group_of_worst = int(np.searchsorted(firsts, worst, "right")) - 1
            raise InputError(
                f"data.row_capacity is {self.row_capacity} and a response of "
                f"{self.dataset.place(group_of_worst)} has {counted(lengths[worst], 'token')} with "
                "its prompt, and data.oversized: split cuts no path: raise it, or build with a "
                "smaller --max-length"
            )

    def _check_sequences(self, group: np.ndarray, micro_batch_size: int) -> None:
        """Refuse bundles of more sequences than a micro batch; `group` is each bundle's group."""
        if self.sharing == "response":  # a bundle has one sequence per response of its set
            # Groups with the sets [0 0 1] and [0 0]: owner [0 0 0 1 1], most 2, keys [0 0 1 2 2],
            # so counts [2 1 2], in the order of `group`.
            firsts = np.asarray(self.dataset.group_responses)
            owner = np.repeat(np.arange(len(self.dataset)), np.diff(firsts))
            sets = np.asarray(self.dataset.response_sets, np.int64)
            most = int(sets.max()) + 1
            counts = np.unique(owner * most + sets, return_counts=True)[1]
        else:
            counts = np.full(len(group), 2 if self.sharing == "none" else 1)
        worst = int(np.argmax(counts > micro_batch_size))
        if counts[worst] > micro_batch_size:
            raise InputError(
                f"data.micro_batch_size is {micro_batch_size} and "
                f"{self.dataset.place(group[worst])} is {counted(counts[worst], 'sequence')} under "
                f"data.sharing: {self.sharing} that must share a micro batch: raise it, or set "
                "data.oversized: split"
            )

    def step(self, step: int) -> Step:
        """Step `step`, counted from 0."""
        groups = self.composition.groups(step)
        rows = self._rows(step, groups)
        costs = [sum(map(self._cost, row)) for row in rows]
        dealt = deal(costs, self.num_ranks)
        parts = [bundle.part for row in rows for bundle in row if bundle.part is not None]
        offsets, ends = self.dataset.group_pairs, groups + 1
        return Step(
            step=step,
            groups=groups,
            rows=[[rows[i] for i in share] for share in dealt],
            denominators=step_denominators(
                self.dataset, groups, self.weighting, self.with_attributes
            ),
            num_pairs=int((offsets[ends] - offsets[ends - 1]).sum()),
            costs=[sum(costs[i] for i in share) for share in dealt],
            is_divided=bool(parts),
            repeated_tokens=sum(part.repeated for part in parts),
        )

    def columns(self, step: Step) -> StepColumns:
        """A step as one table of all ranks' responses and pairs."""
        return step_columns(self.dataset, step.bundles, self.sharing, self.weighting)

    def micro_batches(self, step: Step, rank: int = 0) -> list[MicroBatch]:
        """One rank's rows of a step, ready for the model."""
        collate = collate_padded if self.micro_batch_size else collate_packed
        items = (
            row_items(self.dataset, row, self.sharing, self.weighting) for row in step.rows[rank]
        )
        rows = [collate(row, self.length_multiple, self.targets) for row in items]
        rows = with_row_images(self._with_attributes(rows), self.dataset)
        return [replace(row, is_divided=True) for row in rows] if step.is_divided else rows

    def rows_of_group(self, group: int, sharing: str) -> list[MicroBatch]:
        """A group without packing under any sharing mode: a row for each bundle or part."""
        size = self.row_capacity, self.micro_batch_size
        limits = Limits.of(self.oversized, sharing, *size)
        rows = group_rows(self.dataset, group, sharing, self.targets, limits)
        return self._with_attributes(rows)

    def _with_attributes(self, rows: list[MicroBatch]) -> list[MicroBatch]:
        """The rows with the attributes of their responses, if they are asked for."""
        if not self.with_attributes:
            return rows
        firsts, values = np.asarray(self.dataset.group_responses), self.dataset.response_attributes
        names = self.dataset.attribute_names
        places = [firsts[row.response_ids[:, 0]] + row.response_ids[:, 1] for row in rows]
        return [
            replace(row, attributes=np.asarray(values[own], np.float64), attribute_names=names)
            for row, own in zip(rows, places, strict=True)
        ]

    def _rows(self, step: int, groups: np.ndarray) -> list[Row]:
        """The rows of all ranks: a multiple of `num_ranks * count_multiple` in number.

        Rows come from the composition if it has fixed ones, as `rows_per_step` does. Packed steps
        without fixed rows save one rank the packing; several ranks spread the same bundles by cost.
        """
        multiple = self.num_ranks * self.count_multiple
        if self.micro_batch_size:
            rows = self._fixed_size(self._bundles(groups), self.micro_batch_size)
            return _with_empty_rows(rows, multiple)
        assert self.row_capacity is not None
        composition = self.composition
        # Rows that were packed under another sharing mode may be too long under this one. The step
        # then keeps its groups, and they are packed again.
        if isinstance(composition, RowBatches):
            rows = self._fixed_rows(composition.rows(step))
            if all(sum(b.num_tokens for b in row) <= self.row_capacity for row in rows):
                return _with_empty_rows(rows, multiple)
        bundles = self._bundles(groups)
        tokens = [bundle.num_tokens for bundle in bundles]
        packed = None
        if isinstance(composition, PartBatches) and self._has_parts_of(composition):
            packed = as_lists(*composition.packing(step))
            return _with_empty_rows([[bundles[i] for i in row] for row in packed], multiple)
        if isinstance(composition, PackedSteps):
            packed = composition.rows(step, tokens)
            if composition.has_fixed_rows:
                return _with_empty_rows([[bundles[i] for i in row] for row in packed], multiple)
        costs = [self._cost(bundle) for bundle in bundles] if multiple > 1 else None
        packed = pack_step(tokens, self.row_capacity, multiple, costs, packed, self.packing_method)
        return [[bundles[i] for i in row] for row in packed]

    def _fixed_rows(self, rows: list[np.ndarray]) -> list[Row]:
        """Rows of groups. Slots count through them: rows [7 4] and [7] have slots [0 1] and [2]."""
        firsts = np.cumsum([0, *map(len, rows)])
        return [self._bundles(row, int(first)) for row, first in zip(rows, firsts, strict=False)]

    def _has_parts_of(self, composition: PartBatches) -> bool:
        """Whether the composition's rows are of the same bundles and parts as this sampler's."""
        ours = self.sharing, self.row_capacity, self.oversized
        return ours == (composition.sharing, composition.capacity, "split")

    def _cost(self, bundle: Bundle) -> float:
        if self.cost is None:
            return float(bundle.num_tokens)
        return bundle_work(self.dataset, bundle, self.sharing, self.cost).cost(self.cost)

    def _bundles(self, groups: Iterable[int], first: int = 0) -> Row:
        """The bundles of a step's groups in their order; the first group has slot `first`."""
        return [
            replace(bundle, slot=slot)
            for slot, group in enumerate(groups, first)
            for bundle in bundles_of(self.dataset, int(group), self.sharing, self.limits)
        ]

    def _fixed_size(self, bundles: Row, micro_batch_size: int) -> list[Row]:
        """Whole bundles in their order, at most `micro_batch_size` sequences per row."""
        # Bundles of 2, 2 and 3 sequences, 4 per micro batch: rows [2 2] and [3]. A bundle stays
        # whole, because the loss needs both sides of a pair in one row.
        rows: list[Row] = []
        room = 0
        for bundle in bundles:
            sequences = num_sequences(self.dataset, bundle, self.sharing)
            if sequences > room:
                rows.append([])
                room = micro_batch_size
            rows[-1].append(bundle)
            room -= sequences
        return rows


def _with_empty_rows(rows: list[Row], multiple: int) -> list[Row]:
    return rows + [[] for _ in range(-len(rows) % multiple)]
