"""The table of a step: what objectives read that look at all of its responses at once.

Such an objective needs the scores of all rows of all ranks before it has a loss. So a step runs in
two passes:

1. Forward without gradients. Every rank writes the scores of its own rows into a table of zeros,
   and one sum over data-parallel ranks makes the same table on all of them: each entry has exactly
   one writer, so the sum is exact.
2. Every rank evaluates the objective on this table, which gives the loss and its slope for each
   entry. Forward and backward then run on the sum over entries of slope times score, whose
   gradient is that of the loss.

Entries are those of StepColumns, then, as in ScoreParts, the heads of both sides of each pair, then
the alignments: E entries and P pairs are E, E + 2P or 2E + 2P values, float64. The objective is
evaluated on the CPU, where all ranks compute the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.data.steps import Sampler, Step, StepColumns
from megatron_prefix.distributed import World
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.engine.step import objective_logs
from megatron_prefix.objectives import LossInputs, Objective, ReferenceColumns, ScoreParts
from megatron_prefix.platform import on_device


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTable:
    """The table of one step before anything is computed, and where this rank's rows are in it.

    `places[i]` are the values of row i in the order of what `response_scores` returns for it.
    """

    columns: StepColumns
    places: list[np.ndarray]
    parts: ScoreParts
    denominators: Mapping[str, float]

    @classmethod
    def of(cls, sampler: Sampler, plan: Step, rank: int, parts: ScoreParts) -> StepTable:
        columns = sampler.columns(plan)
        places = [table_places(columns, *columns.row_places(row), parts) for row in plan.rows[rank]]
        return cls(columns=columns, places=places, parts=parts, denominators=plan.denominators)

    @property
    def size(self) -> int:
        """Values of the whole table."""
        entries, pairs = self.columns.num_entries, len(self.columns.pairs)
        return entries + (2 * pairs if self.parts.heads else 0) + entries * self.parts.alignments

    def responses(self, is_chosen: np.ndarray) -> list[str]:
        """The responses of the chosen values of the table, bool [size], as text; of heads, those of
        their pairs."""
        num_entries, num_pairs = self.columns.num_entries, len(self.columns.pairs)
        entries = is_chosen[:num_entries].copy()
        if self.parts.heads:
            heads = is_chosen[num_entries : num_entries + 2 * num_pairs].reshape(-1, 2)
            entries[self.columns.pairs[heads]] = True
        if self.parts.alignments:
            entries |= is_chosen[-num_entries:]
        chosen = np.unique(self.columns.response_ids[entries], axis=0)
        return [f"group {group} response {response}" for group, response in chosen]

    def gather(self, rows: Sequence[Tensor], world: World) -> Tensor:
        """What every rank computed of its rows, as one table on the CPU, float64. Collective.

        A row may lack its last values, as a reference has no alignments; they are 0.
        """
        own = torch.zeros(self.size, dtype=torch.float64, device=world.device)
        for places, values in zip(self.places, rows, strict=True):
            own[on_device(places[: len(values)], own.device)] = values.to(own)
        return world.sum(own).cpu()

    def gather_references(
        self, batches: Sequence[TrainBatch], world: World
    ) -> ReferenceColumns | None:
        """Several references of all rows, on the CPU; None if the rows have one. Collective."""
        first = batches[0].references
        if first is None:
            return None
        logps, heads = [], []
        for k in range(len(first.logps)):
            vector = self.gather([batch.reference_scores(k) for batch in batches], world)
            own, own_heads, _ = self.parts.split(vector, self.columns.num_entries)
            logps.append(own)
            heads.append(own_heads)
        return replace(
            first,
            logps=torch.stack(logps),
            weights=None if first.weights is None else first.weights.cpu(),
            heads=None if first.heads is None else torch.stack(heads),
        )

    def loss(
        self,
        objective: Objective,
        scores: Tensor,
        reference: Tensor | None,
        references: ReferenceColumns | None = None,
        running_rewards: tuple[float, float] = (0.0, 0.0),
        kl: Tensor | None = None,
    ) -> TableLoss:
        """Loss of the step and its slopes; `scores` and `reference` are tables of `gather`,
        `running_rewards` the sum and number of the rewards of the steps before, and `kl` is that of
        LossInputs."""
        own = scores.detach().clone().requires_grad_()
        num_entries = self.columns.num_entries
        logps, heads, alignments = self.parts.split(own, num_entries)
        ref_logps = ref_heads = None
        if reference is not None:
            ref_logps, ref_heads, _ = self.parts.split(reference, num_entries)
        inputs = LossInputs.of_arrays(
            self.columns.arrays(),
            scores=logps,
            ref_logps=ref_logps,
            heads=heads,
            ref_heads=ref_heads,
            references=references,
            alignments=alignments,
            running_rewards=torch.tensor(running_rewards, dtype=torch.float64),
            kl=None if kl is None else kl.cpu(),
        )
        inputs = objective.advanced(inputs)
        with torch.enable_grad():
            value, logs = objective_logs(objective, inputs, self.denominators)
            (slopes,) = torch.autograd.grad(value, [own], materialize_grads=True)
        assert inputs.running_rewards is not None
        total, count = inputs.running_rewards.tolist()
        return TableLoss(inputs=inputs, logs=logs, running_rewards=(total, count), slopes=slopes)


@dataclass(frozen=True, kw_only=True, eq=False)
class TableLoss:
    """What the objective makes of a table: `objective_logs` of the step, and d loss / d value for
    each value of the table, float64."""

    inputs: LossInputs
    logs: dict
    running_rewards: tuple[float, float]
    slopes: Tensor


def table_places(
    columns: StepColumns, entries: np.ndarray, pairs: np.ndarray, parts: ScoreParts
) -> np.ndarray:
    """Where the values of a row belong in the table.

    Ten entries and pairs 3 and 0 of four, with heads: two entries 7 and 8 and then the heads of
    both sides are [7 8 | 16 17 10 11].
    """
    places = [entries]
    num_entries, first_alignment = columns.num_entries, columns.num_entries
    if parts.heads:
        places.append((num_entries + 2 * pairs[:, None] + np.arange(2)).ravel())
        first_alignment += 2 * len(columns.pairs)
    if parts.alignments:
        places.append(first_alignment + entries)
    return np.concatenate(places)
