"""A step with every response alone, run like any step whose objective looks at all of it: the
scores of all rows make one table, and its slopes are what backward needs (engine/table.py).

So the loss of every objective is computed from whole responses, whatever its unit, and no row needs
more than one of them. Shapes: R responses of a row, which are one or none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.steps.alone import AloneSteps, whole_group
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.distributed import World
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.engine.feed import StepRows
from megatron_prefix.engine.step import noisy_scores
from megatron_prefix.engine.table import StepTable, TableLoss, table_places
from megatron_prefix.objectives import Objective, ReferenceColumns, ScoreParts
from megatron_prefix.platform import on_device


@dataclass(frozen=True, eq=False)
class TableReference:
    """What the reference gives for a table: nothing, one value for each, or those of several."""

    values: Tensor | None = None
    several: ReferenceColumns | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AloneTable:
    """The table of a step, and this rank's rows as they run alone."""

    table: StepTable
    batches: list[TrainBatch]
    responses: np.ndarray
    """int64 [E]: each entry of the table as a response among all of the data set."""
    pairs: np.ndarray
    """int64 [P]: each pair of the table among all of the data set, those left out included."""
    num_responses: int
    """Of the data set."""

    @classmethod
    def of(cls, steps: AloneSteps, step: StepRows, rank: int, parts: ScoreParts) -> AloneTable:
        """`step` is one of `steps`, prepared for these parts."""
        columns = steps.columns(step.plan)
        batches, places = [], []
        for bundles, row, batch in zip(step.plan.rows[rank], step.rows, step.batches, strict=True):
            own = np.zeros(0, np.int64)
            sides: list[tuple[int, int]] = []
            for bundle in bundles:
                own = columns.places[whole_group(bundle.group, bundle.slot)][0][[bundle.item]]
                # pairs [[4 6] [7 4]] of the whole table: response 4 is the sides (0, 0) and (1, 1)
                sides = [(int(p), int(s)) for p, s in np.argwhere(columns.pairs == own)]
            place = table_places(columns, own, np.zeros(0, np.int64), parts)
            if parts.heads:
                lengths = columns.num_tokens[columns.pairs].min(axis=1)
                batch = with_heads(batch, row, [int(lengths[pair]) for pair, _ in sides])
                heads = [columns.num_entries + 2 * pair + side for pair, side in sides]
                place = np.insert(place, len(own), heads)
            batches.append(batch.without_auxiliary())
            places.append(place.astype(np.int64))
        table = StepTable(
            columns=columns, places=places, parts=parts, denominators=step.plan.denominators
        )
        dataset = steps.sampler.dataset
        group, response = columns.response_ids.T
        return cls(
            table=table,
            batches=batches,
            responses=np.asarray(dataset.group_responses)[group] + response,
            pairs=pair_numbers(dataset, step.plan.groups),
            num_responses=len(dataset.response_lengths),
        )

    def scores(self, chunks: list[torch.nn.Module], world: World) -> tuple[Tensor, Tensor]:
        """Tables of the scores of all responses and of their noise (`response_noise`), which is 0
        for other values. Collective."""
        values = noisy_scores(chunks, self.batches)
        scores = self.table.gather([x["scores"] for x in values], world)
        return scores, self.table.gather([x["noise"] for x in values], world)

    def reference_of_rows(self, scores: list[Tensor], world: World) -> TableReference:
        """What a reference model computed of this rank's rows. Collective."""
        return TableReference(self.table.gather(scores, world))

    def reference_of_data_set(
        self, scores: np.ndarray, weights: np.ndarray | None, anchor: int
    ) -> TableReference:
        """What is known of the whole data set, in the order of `score_dataset`, [values], or of
        several references, [K, values], with their weights in the step [K]."""
        if scores.ndim == 1:
            return TableReference(self._of_data_set(scores))
        values = [self._of_data_set(own) for own in scores]
        parts = [self.table.parts.split(x, self.table.columns.num_entries) for x in values]
        several = ReferenceColumns(
            logps=torch.stack([logps for logps, _, _ in parts]),
            weights=None if weights is None else torch.from_numpy(weights),
            anchor=anchor,
            heads=torch.stack([x for _, x, _ in parts]) if self.table.parts.heads else None,
        )
        return TableReference(values[anchor], several)

    def _of_data_set(self, scores: np.ndarray) -> Tensor:
        values = [scores[self.responses]]
        if self.table.parts.heads:
            heads = scores[self.num_responses :].reshape(-1, 2)
            values.append(heads[self.pairs].ravel())
        joined = np.concatenate(values)
        return torch.from_numpy(np.pad(joined, (0, self.table.size - len(joined))))

    def loss(
        self,
        objective: Objective,
        scores: Tensor,
        reference: TableReference,
        running_rewards: tuple[float, float],
        kl: Tensor | None,
    ) -> TableLoss:
        """`running_rewards` are those of the steps before, `kl` is that of LossInputs."""
        return self.table.loss(
            objective, scores, reference.values, reference.several, running_rewards, kl
        )

    def sloped(self, slopes: Tensor) -> list[TrainBatch]:
        """The rows with the slopes of the loss, [size of the table]."""
        return [
            batch.with_slopes(slopes[torch.from_numpy(place)].to(batch.tokens.device))
            for batch, place in zip(self.batches, self.table.places, strict=True)
        ]


def pair_numbers(dataset: PreferenceDataset, groups: np.ndarray) -> np.ndarray:
    """The pairs of these groups, one group after another, among all pairs of the data set, int64.

    With `dataset.pair_numbers`, [0 2 3] of four pairs, group 1 has the second and third: [2 3].
    """
    offsets = np.asarray(dataset.group_pairs)
    own = [np.arange(offsets[group], offsets[group + 1]) for group in groups]
    numbers = np.concatenate([np.zeros(0, np.int64), *own])
    return numbers if dataset.pair_numbers is None else dataset.pair_numbers[numbers]


def with_heads(batch: TrainBatch, row: MicroBatch, lengths: list[int]) -> TrainBatch:
    """The row of one response with a head of each of these lengths, one for every side of a pair
    that the response is; a head is its first tokens.

    A response whose tokens 0, 2 and 3 of four are this rank's, lengths [3, 1]: the heads are
    the first 2 and the first 1 of its own targets, order [0 1 | 0], offsets [0 2 3].
    """
    share = batch.params.share
    is_own = np.isin(row.logit_token, np.arange(len(row.tokens)) if share is None else share.tokens)
    own = np.flatnonzero(is_own)
    counts = [int((own < length).sum()) for length in lengths]
    order = [np.arange(count) for count in counts]
    device = batch.tokens.device
    return replace(
        batch,
        head_order=on_device(np.concatenate([np.zeros(0, np.int64), *order]), device),
        head_offsets=on_device(np.cumsum([0, *counts]), device),
    )
