"""The reference of a step's own responses and of its mismatches, from rows that hold both.

A group's mismatch follows the same prompt as its own responses. In one tree the prompt is computed
once for all of them:

    own rows    prompt -> 0, 1          policy, forward and backward
    mismatches  prompt -> 2             policy, forward
    joint rows  prompt -> 0, 1, 2       reference, forward

Joint rows are packed and dealt to ranks by themselves, so a rank may have the reference of other
groups than those of its own rows. One sum over ranks gives all of them to every rank.

Shapes: E entries of the step's table, R responses of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.distributed import World
from megatron_prefix.engine import StepRows, TrainBatch
from megatron_prefix.platform import on_device
from megatron_prefix.reference import Reference


@dataclass(frozen=True, eq=False)
class JointScores:
    """Reference log-probabilities of the responses of a step, the same on all ranks.

    numbers int64 [E] are responses as the data set stores them, in ascending order; logps float64
    [E] are on the device.
    """

    numbers: np.ndarray
    logps: Tensor

    @classmethod
    def scored(
        cls, reference: Reference, step: StepRows, stored: PreferenceDataset, world: World
    ) -> JointScores:
        """Those of a step whose rows are of the data set `stored`, mismatches included, from a
        reference that is a model. Collective."""
        rows = reference.score_rows(step.batches)
        assert rows is not None and step.table is not None, "the rows are for a model, in a table"
        numbers = stored.stored_numbers(step.table.columns.response_ids)
        # A step that crosses the end of an epoch can have a group twice. Of the responses
        # [7 8 3 4 7 8], 7 and 8 are taken from the first time: [3 4 7 8] at the places [2 3 0 1].
        numbers, places = np.unique(numbers, return_index=True)
        logps = step.table.gather(rows, world)[torch.from_numpy(places)]
        return cls(numbers, logps.to(world.device))

    def attach(
        self, rows: list[MicroBatch], batches: list[TrainBatch], dataset: PreferenceDataset
    ) -> list[TrainBatch]:
        """Rows of `dataset`, which has some of the stored responses, with their reference."""
        return [
            batch.with_reference(self._of(dataset.stored_numbers(row.response_ids)))
            for row, batch in zip(rows, batches, strict=True)
        ]

    def _of(self, numbers: np.ndarray) -> Tensor:
        places = np.searchsorted(self.numbers, numbers)
        return self.logps[on_device(places, self.logps.device)]
