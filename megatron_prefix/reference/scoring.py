"""Rows and whole data sets scored by a model: log-probabilities of every response.

Shapes: R responses of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.distributed import World
from megatron_prefix.engine import Feed, StepRows, TrainBatch, score_rows
from megatron_prefix.model import unwrap
from megatron_prefix.objectives import ScoreParts
from megatron_prefix.reference.places import pair_index, response_index
from megatron_prefix.reference.sidecars import PartialScores

SAVE_STEPS = 32
"""Steps of scoring between two saves of the scores so far."""


def with_reference(chunks: list[torch.nn.Module], batches: list[TrainBatch]) -> list[TrainBatch]:
    """The same rows with the reference model's log-probabilities, from one pass over them."""
    own = [batch.for_reference() for batch in batches]
    attached = []
    for batch, row, vector in zip(batches, own, score_rows(chunks, own), strict=True):
        logps, heads, _ = row.parts.split(vector, len(row.response_tokens))
        attached.append(batch.with_reference(logps, heads))
    return attached


def score_dataset(
    chunks: list[torch.nn.Module],
    sampler: Sampler,
    world: World,
    saved: PartialScores | None = None,
    parts: ScoreParts | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Log-probability of every response of the sampler's data set, or a reward model's score of
    it, float64 [responses], and what `parts` adds, for the pairs and responses of the data set.

    Responses are numbered through the whole data set in its order. A response that runs several
    times (several pairs with sharing `none`) gets the mean. A response that never runs (one without
    a pair, with sharing `none` or `pair`) is NaN. Every rank runs its own rows and returns the
    scores of all. With `saved`, scoring continues from the scores saved there, and saves to it.
    `tell` is called after each step with the steps done and the steps of all.
    """
    dataset = sampler.dataset
    first, sums = world.once(lambda: (saved.step, saved.sums) if saved else (0, None))
    parts = parts or ScoreParts()
    places = ScorePlaces(dataset.whole or dataset, parts)
    if sums is None:
        sums = np.zeros((2, places.size))
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    num_steps = sampler.composition.num_steps(1)
    with closing(Feed(sampler, world, unwrap(chunks[0]).config, num_steps, parts)) as feed:
        for start in range(first, num_steps, SAVE_STEPS):
            stop = min(start + SAVE_STEPS, num_steps)
            # Summed over ranks once per SAVE_STEPS steps. `sums` is then the same on every rank, so
            # it does not matter which one saves it.
            local_sums = np.zeros_like(sums)
            for step in range(start, stop):
                world.beat(f"scoring, step {step + 1} of {num_steps}")
                _add_scores(chunks, places, feed.step(step), local_sums)
                if tell is not None:
                    tell(step + 1, num_steps)
            sums += world.sum(torch.from_numpy(local_sums).to(world.device)).cpu().numpy()
            if saved is not None:
                saved.sums = sums
                world.once(partial(saved.save, stop))
    for chunk, training in zip(chunks, was_training, strict=True):
        chunk.train(training)
    with np.errstate(invalid="ignore"):
        # Sums [-3, -8, 0] over times [1, 2, 0]: -3, -4 and NaN
        return sums[0] / sums[1]


@dataclass(frozen=True, eq=False)
class ScorePlaces:
    """Where what a model computes of a row belongs among that of the whole data set."""

    dataset: PreferenceDataset
    parts: ScoreParts

    @property
    def size(self) -> int:
        """Entries of the whole data set."""
        heads = 2 * len(self.dataset.pair_weights) if self.parts.heads else 0
        responses = len(self.dataset.response_lengths)
        attributes = self.parts.num_labels * responses if self.parts.num_labels > 1 else 0
        return responses + heads + attributes + (responses if self.parts.alignments else 0)

    def of(self, row: MicroBatch) -> np.ndarray:
        """The places of a row's entries, in their order."""
        responses = response_index(self.dataset, row)
        places = [responses]
        if self.parts.heads:
            sides = 2 * pair_index(self.dataset, row)[:, None] + np.arange(2)
            places.append(len(self.dataset.response_lengths) + sides.ravel())
        if self.parts.num_labels > 1:
            num_responses = len(self.dataset.response_lengths)
            lines = np.arange(1, self.parts.num_labels + 1) * num_responses
            places.append((lines[:, None] + responses).ravel())
        if self.parts.alignments:
            places.append(self.size - len(self.dataset.response_lengths) + responses)
        return np.concatenate(places)


def _add_scores(
    chunks: list[torch.nn.Module], places: ScorePlaces, step: StepRows, sums: np.ndarray
) -> None:
    """Add this rank's rows of a step to `sums` [2, entries]: scores, and times each ran."""
    for row, scores in zip(step.rows, score_rows(chunks, step.batches), strict=True):
        index = places.of(row)
        # A response may be several times in a row, so `sums[0][index] += scores` would count it
        # once.
        np.add.at(sums[0], index, scores.cpu().numpy())
        np.add.at(sums[1], index, 1)
