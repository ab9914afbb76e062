"""The step plan: which groups make a step, in which rows, on which data-parallel rank.

1. A **composition** says which groups share step s: a pure function of (data set fingerprint,
   seed, step). `GroupBatches` takes `global_batch_size` groups off a seeded permutation;
   `RowBatches` packs seeded windows first and takes `rows_per_step` rows.
2. The **sampler** cuts the step's groups into bundles under its `sharing` mode, packs them
   into rows, adds as few empty rows as make all ranks equal, and deals rows to ranks.
3. The step's normaliser is known here, before anything is computed.

There is no iterator state: resuming at step s, or on another number of ranks, is `step(s)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_prefix.data.collate import (
    MicroBatch,
    RowItem,
    Targets,
    collate_packed,
    collate_padded,
    tree_targets,
)
from megatron_prefix.data.packing import deal, first_fit_decreasing, pack_step
from megatron_prefix.data.sharing import Bundle, all_bundles, bundles_of, view
from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from megatron_prefix.data.store import PreferenceDataset

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


@lru_cache(maxsize=2)
def _permutation(num_groups: int, fingerprint: str, seed: int, epoch: int) -> np.ndarray:
    return seeded("order", fingerprint, seed, epoch).permutation(num_groups)


@dataclass(frozen=True, eq=False)
class RowBatches:
    """`rows_per_step` packed rows a step.

    An epoch's groups are permuted, packed first-fit-decreasing in windows of `window` groups,
    and the rows of all windows are permuted. A row holds whole groups, so a group is in one
    step only; its last step has the rows that remain.
    """

    lengths: np.ndarray
    """Tokens of each group under the sharing mode that is packed, [groups]."""
    capacity: int
    rows_per_step: int
    fingerprint: str
    seed: int
    window: int = WINDOW

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
        start = (step - first) * self.rows_per_step
        return self._epoch(epoch)[start : start + self.rows_per_step]

    def groups(self, step: int) -> np.ndarray:
        return np.concatenate(self.rows(step))

    def num_steps(self, epochs: int) -> int:
        return sum(self._steps_of(epoch) for epoch in range(epochs))

    @cache  # noqa: B019 (a run has one composition, alive as long as the run)
    def _steps_of(self, epoch: int) -> int:
        """Each epoch is packed anew, so that epochs may differ by a row."""
        return -(-len(self._epoch(epoch)) // self.rows_per_step)

    def fill(self, epoch: int = 0) -> float:
        """Tokens over capacity, over all rows of an epoch, at most 1."""
        return float(self.lengths.sum() / (self.capacity * len(self._epoch(epoch))))

    @lru_cache(maxsize=2)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _epoch(self, epoch: int) -> list[np.ndarray]:
        order = seeded("order", self.fingerprint, self.seed, epoch).permutation(len(self.lengths))
        rows = []
        for start in range(0, len(order), self.window):
            groups = order[start : start + self.window]
            packed = first_fit_decreasing(self.lengths[groups], self.capacity)
            rows += [groups[items] for items in packed]
        shuffle = seeded("rows", self.fingerprint, self.seed, epoch).permutation(len(rows))
        return [rows[i] for i in shuffle]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """One step: `rows[rank]` lists that rank's rows, each a list of bundles.

    `weight` is the sum of pair weights over the whole step: the loss's denominator.
    """

    step: int
    groups: np.ndarray
    rows: list[list[list[Bundle]]]
    weight: float
    num_pairs: int


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
    by that many sequences, padded. `targets` says what the model is asked of each tree. Raises
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

    def __post_init__(self) -> None:
        if not (self.row_capacity or self.micro_batch_size):
            raise ValueError("a sampler needs row_capacity (tokens) or micro_batch_size")
        self._check_fit()

    def _check_fit(self) -> None:
        group, item, tokens = all_bundles(self.dataset, self.sharing)
        if self.micro_batch_size:
            self._check_sequences(group, item)
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

    def _check_sequences(self, group: np.ndarray, item: np.ndarray) -> None:
        for g, i in zip(group.tolist(), item.tolist(), strict=True):
            sequences = self._num_sequences(Bundle(g, i, 0))
            if sequences > self.micro_batch_size:
                raise InputError(
                    f"{self.dataset.prefix}: group {g} is {sequences} sequences under "
                    f"data.sharing: {self.sharing} that must share a micro batch, and "
                    f"data.micro_batch_size is {self.micro_batch_size}: raise it"
                )
            if self.sharing != "response":
                return  # alike for all groups

    def step(self, step: int) -> StepPlan:
        """The plan of step `step`, counted from 0."""
        groups = self.composition.groups(step)
        rows = self._rows(step, groups)
        dealt = deal([sum(b.num_tokens for b in row) for row in rows], self.num_ranks)
        weights = [loss_weights(self.dataset, int(g), self.weighting) for g in groups]
        return StepPlan(
            step=step,
            groups=groups,
            rows=[[rows[i] for i in share] for share in dealt],
            weight=float(sum(w.sum() for w in weights)),
            num_pairs=sum(len(w) for w in weights),
        )

    def micro_batches(self, plan: StepPlan, rank: int = 0) -> list[MicroBatch]:
        """One rank's rows of a step, ready for the model."""
        collate = collate_padded if self.micro_batch_size else collate_packed
        return [
            collate(self._items(row), self.row_multiple, self.targets) for row in plan.rows[rank]
        ]

    def _rows(self, step: int, groups: np.ndarray) -> list[list[Bundle]]:
        multiple = self.num_ranks * self.count_multiple
        if isinstance(self.composition, RowBatches) and not self.micro_batch_size:
            packed = [self._bundles(row) for row in self.composition.rows(step)]
            if all(sum(b.num_tokens for b in row) <= self.row_capacity for row in packed):
                return packed + [[] for _ in range(-len(packed) % multiple)]
        bundles = self._bundles(groups)
        if self.micro_batch_size:
            rows = self._fixed_size(bundles)
            return rows + [[] for _ in range(-len(rows) % multiple)]
        packed = pack_step([b.num_tokens for b in bundles], self.row_capacity, multiple)
        return [[bundles[i] for i in row] for row in packed]

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


def group_lengths(dataset: PreferenceDataset, sharing: str) -> np.ndarray:
    """Tokens of each group under a sharing mode, int64 [groups]."""
    group, _, tokens = all_bundles(dataset, sharing)
    return np.bincount(group, tokens, len(dataset)).astype(np.int64)
