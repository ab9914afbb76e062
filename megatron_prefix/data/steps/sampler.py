"""The step plan: which groups make a step, in which rows, on which data-parallel rank.

1. A **composition** (composition.py) says which groups share step s: a pure function of (data
   set fingerprint, seed, step).
2. The **sampler** cuts the step's groups into bundles under its `sharing` mode, packs them
   into rows, adds as few empty rows as make all ranks equal, and deals rows to ranks by cost.
3. The step's normaliser is known here, before anything is computed.

There is no iterator state: resuming at step s, or on another number of ranks, is `step(s)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.data.steps.collate import (
    MicroBatch,
    RowItem,
    Targets,
    collate_packed,
    collate_padded,
    tree_targets,
)
from megatron_prefix.data.steps.composition import Composition, RowBatches
from megatron_prefix.data.steps.cost import CostModel, bundle_work
from megatron_prefix.data.steps.packed_steps import PackedPlan
from megatron_prefix.data.steps.packing import deal, pack_step
from megatron_prefix.data.steps.sharing import Bundle, all_bundles, bundles_of, view
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """One step: `rows[rank]` lists that rank's rows, each a list of bundles.

    `weight` is the sum of pair weights over the whole step: the loss's denominator. `costs[rank]`
    is what that rank's rows cost, in FLOP of a forward pass, or tokens without a cost model.
    """

    step: int
    groups: np.ndarray
    rows: list[list[list[Bundle]]]
    weight: float
    num_pairs: int
    costs: list[float]


def loss_weights(dataset: PreferenceDataset, group: int, weighting: str) -> np.ndarray:
    """What each pair of a group weighs in the loss, [pairs].

    `pair`: its own weight. `group`: its share of its comparison set, which weighs 1.
    """
    p0, p1 = (int(x) for x in dataset.group_pairs[group : group + 2])
    weights = dataset.pair_weights[p0:p1].astype(np.float64)
    if weighting == "pair":
        return weights
    r0 = int(dataset.group_responses[group])
    sets = np.asarray(dataset.response_sets[r0 + dataset.pair_responses[p0:p1, 0]])
    return weights / np.bincount(sets, weights)[sets]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Steps of one data set under one sharing mode, for `num_ranks` data-parallel ranks.

    `row_multiple` rounds row lengths up (tensor x context parallel size), `count_multiple` the
    rows a rank (pipeline size under virtual pipelining). `micro_batch_size` replaces packing
    by that many sequences, padded. `targets` says what the model is asked of each tree; `cost` is
    what ranks get alike of, tokens without it. Raises
    InputError where any bundle of the data set does not fit, before the first step.
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

    def __post_init__(self) -> None:
        if not (self.row_capacity or self.micro_batch_size):
            raise ValueError("a sampler needs row_capacity (tokens) or micro_batch_size")
        if not isinstance(self.composition, PackedPlan):  # what is packed fits
            self._check_fit()

    def _check_fit(self) -> None:
        group, _, tokens = all_bundles(self.dataset, self.sharing)
        if self.micro_batch_size:
            self._check_sequences(group)
            if self.sharing in ("none", "response"):
                tokens = np.asarray(self.dataset.response_lengths, np.int64)
                group = np.repeat(
                    np.arange(len(self.dataset)), np.diff(self.dataset.group_responses)
                )
        worst = int(tokens.argmax())
        if self.row_capacity and tokens[worst] > self.row_capacity:
            what = "one sequence" if self.micro_batch_size else "one row"
            raise InputError(
                f"{self.dataset.prefix}: group {group[worst]} needs {tokens[worst]} tokens in "
                f"{what} under data.sharing: {self.sharing}, and data.row_capacity is "
                f"{self.row_capacity}: raise it, or build with a smaller --max-length"
            )

    def _check_sequences(self, group: np.ndarray) -> None:
        if self.sharing == "response":  # as many as a comparison set has responses
            firsts = np.asarray(self.dataset.group_responses)
            owner = np.repeat(np.arange(len(self.dataset)), np.diff(firsts))
            sets = np.asarray(self.dataset.response_sets, np.int64)
            most = int(sets.max()) + 1
            counts = np.unique(owner * most + sets, return_counts=True)[1]
        else:
            counts = np.full(len(group), 2 if self.sharing == "none" else 1)
        worst = int(np.argmax(counts > self.micro_batch_size))
        if counts[worst] > self.micro_batch_size:
            raise InputError(
                f"{self.dataset.prefix}: group {group[worst]} is {counts[worst]} sequences under "
                f"data.sharing: {self.sharing} that must share a micro batch, and "
                f"data.micro_batch_size is {self.micro_batch_size}: raise it"
            )

    def step(self, step: int) -> StepPlan:
        """The plan of step `step`, counted from 0."""
        groups = self.composition.groups(step)
        rows = self._rows(step, groups)
        costs = [sum(map(self._cost, row)) for row in rows]
        dealt = deal(costs, self.num_ranks)
        weights = [loss_weights(self.dataset, int(g), self.weighting) for g in groups]
        return StepPlan(
            step=step,
            groups=groups,
            rows=[[rows[i] for i in share] for share in dealt],
            weight=float(sum(w.sum() for w in weights)),
            num_pairs=sum(len(w) for w in weights),
            costs=[sum(costs[i] for i in share) for share in dealt],
        )

    def micro_batches(self, plan: StepPlan, rank: int = 0) -> list[MicroBatch]:
        """One rank's rows of a step, ready for the model."""
        collate = collate_padded if self.micro_batch_size else collate_packed
        return [
            collate(self._items(row), self.row_multiple, self.targets) for row in plan.rows[rank]
        ]

    def _rows(self, step: int, groups: np.ndarray) -> list[list[Bundle]]:
        multiple = self.num_ranks * self.count_multiple
        if self.micro_batch_size:
            rows = self._fixed_size(self._bundles(groups))
            return rows + [[] for _ in range(-len(rows) % multiple)]
        bundles, tokens, packed, is_fixed = self._packed(step, groups)
        if is_fixed:
            packed += [[] for _ in range(-len(packed) % multiple)]
        else:
            costs = [self._cost(bundle) for bundle in bundles] if multiple > 1 else None
            packed = pack_step(
                tokens, self.row_capacity, multiple, costs, packed, self.packing_method
            )
        return [[bundles[i] for i in row] for row in packed]

    def _packed(
        self, step: int, groups: np.ndarray
    ) -> tuple[list[Bundle], list[int], list[list[int]] | None, bool]:
        """Bundles, their tokens, the rows that the composition has for them (indices of bundles;
        None where it has none), and whether those rows are what makes the step."""
        composition = self.composition
        if isinstance(composition, RowBatches):
            parts = [self._bundles(row) for row in composition.rows(step)]
            bundles = [bundle for part in parts for bundle in part]
            index = iter(range(len(bundles)))
            rows = [[next(index) for _ in part] for part in parts]
            fits = all(sum(b.num_tokens for b in p) <= self.row_capacity for p in parts)
            tokens = [bundle.num_tokens for bundle in bundles]
            return bundles, tokens, rows if fits else None, fits
        bundles = self._bundles(groups)
        tokens = [bundle.num_tokens for bundle in bundles]
        if isinstance(composition, PackedPlan):
            return bundles, tokens, composition.rows(step, tokens), composition.has_fixed_rows
        return bundles, tokens, None, False

    def _cost(self, bundle: Bundle) -> float:
        if self.cost is None:
            return float(bundle.num_tokens)
        return bundle_work(self.dataset, bundle, self.sharing).cost(self.cost)

    def _bundles(self, groups: Sequence[int]) -> list[Bundle]:
        return [b for g in groups for b in bundles_of(self.dataset, int(g), self.sharing)]

    def _fixed_size(self, bundles: list[Bundle]) -> list[list[Bundle]]:
        """Whole bundles in their order, at most `micro_batch_size` sequences together."""
        rows: list[list[Bundle]] = []
        room = 0
        for bundle in bundles:
            sequences = self._num_sequences(bundle)
            if sequences > room:
                rows.append([])
                room = self.micro_batch_size
            rows[-1].append(bundle)
            room -= sequences
        return rows

    def _num_sequences(self, bundle: Bundle) -> int:
        if self.sharing in ("tree", "pair"):
            return 1
        if self.sharing == "none":
            return 2
        r0, r1 = self.dataset.group_responses[bundle.group : bundle.group + 2]
        return int((self.dataset.response_sets[r0:r1] == bundle.item).sum())

    def _items(self, row: list[Bundle]) -> list[RowItem]:
        items = []
        for bundle in row:
            part = view(self.dataset[bundle.group], self.sharing, bundle.item)
            weights = loss_weights(self.dataset, bundle.group, self.weighting)[part.pairs]
            items.append(RowItem(group=bundle.group, view=part, pair_weights=weights))
        return items
