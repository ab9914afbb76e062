"""Steps whose responses run alone: one sequence per row, nothing shared and nothing packed.

The groups of a step are those of a sampler. Every response of each group is a row of its own, with
its whole prompt, once per place (slot) that the group has in the step. So no row has a branch, and
other layouts can be compared with these rows. A group stays on one data-parallel rank; ranks get
empty rows until all have the same number, a multiple of the pipeline's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_prefix.data.steps.collate import MicroBatch, RowItem, collate_packed
from megatron_prefix.data.steps.rows import with_row_images
from megatron_prefix.data.steps.sampler import Row, Sampler, Step
from megatron_prefix.data.steps.sharing import Bundle, alone
from megatron_prefix.data.steps.step_columns import StepColumns, step_columns
from megatron_prefix.data.store import PreferenceDataset


@dataclass(frozen=True, kw_only=True, eq=False)
class AloneSteps:
    """The steps of `sampler` with every response alone.

    A bundle of a row is one response: `item` is its index in the group. With `most_groups` a step
    has its first groups only, and what it is divided by is still that of the whole step.
    """

    sampler: Sampler
    most_groups: int | None = None

    @property
    def dataset(self) -> PreferenceDataset:
        return self.sampler.dataset

    def step(self, step: int) -> Step:
        """Step `step`, counted from 0."""
        plan = self.sampler.step(step)
        groups = plan.groups[: self.most_groups]
        rows = self._rows(groups)
        offsets = self.sampler.dataset.group_pairs
        return Step(
            step=step,
            groups=groups,
            rows=rows,
            denominators=plan.denominators,
            num_pairs=int((offsets[groups + 1] - offsets[groups]).sum()),
            costs=[float(sum(b.num_tokens for row in share for b in row)) for share in rows],
        )

    def micro_batches(self, step: Step, rank: int = 0) -> list[MicroBatch]:
        """One rank's rows of a step, ready for the model."""
        sampler = self.sampler
        rows = [
            collate_packed(
                [
                    RowItem(
                        group=bundle.group,
                        view=alone(sampler.dataset[bundle.group], bundle.item),
                        pair_weights=np.zeros(0),
                    )
                    for bundle in row
                ],
                sampler.length_multiple,
                sampler.targets,
            )
            for row in step.rows[rank]
        ]
        return with_row_images(rows, sampler.dataset)

    def columns(self, step: Step) -> StepColumns:
        """The step as one table: each response once per slot, with all pairs. Its places are those
        of `whole_group`."""
        bundles = [whole_group(int(group), slot) for slot, group in enumerate(step.groups)]
        return step_columns(self.sampler.dataset, bundles, "tree", self.sampler.weighting)

    def _rows(self, groups: np.ndarray) -> list[list[Row]]:
        """The rows of each rank: each group goes to the rank that has the fewest tokens."""
        sampler = self.sampler
        rows: list[list[Row]] = [[] for _ in range(sampler.num_ranks)]
        tokens = [0] * sampler.num_ranks
        for slot, group in enumerate(groups.tolist()):
            r0, r1 = (int(x) for x in sampler.dataset.group_responses[group : group + 2])
            lengths = sampler.dataset.response_lengths[r0:r1].tolist()
            rank = tokens.index(min(tokens))
            rows[rank] += [[Bundle(group, i, int(n), slot)] for i, n in enumerate(lengths)]
            tokens[rank] += sum(lengths)
        multiple = sampler.count_multiple
        most = -(-max(1, *map(len, rows)) // multiple) * multiple
        return [share + [[] for _ in range(most - len(share))] for share in rows]


def whole_group(group: int, slot: int) -> Bundle:
    """A group at its place in a step, as the table of AloneSteps has it."""
    return Bundle(group, 0, 0, slot)
