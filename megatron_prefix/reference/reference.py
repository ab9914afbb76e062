"""Log-probabilities without gradients: the reference of a run, and whole data sets.

A reference is a frozen copy of the initial policy that runs over each step's rows
(`ModelReference`), or what such a copy said, read from a file (`PrecomputedReference`). A reward
model has none.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_prefix.config.schema import LossConfig
from megatron_prefix.data.steps.collate import MicroBatch
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.distributed.world import World
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.engine.feed import Feed, PreparedStep
from megatron_prefix.engine.step import run_schedule
from megatron_prefix.model.gpt import unwrap
from megatron_prefix.platform.transfer import on_device
from megatron_prefix.reference.sidecars import PartialScores

SAVE_STEPS = 32
"""Steps of scoring between two saves of what is done."""


class Reference(Protocol):
    """What a run's rewards are measured from."""

    fingerprint: str
    """Of the model; see fingerprint.py."""
    rounding: float
    """Relative difference that the policy's own log-probabilities may have from these while
    both are the same model."""

    def attach(self, rows: list[MicroBatch], batches: list[TrainBatch]) -> list[TrainBatch]:
        """The same rows with reference log-probabilities."""

    def score(self, sampler: Sampler) -> np.ndarray | None:
        """Of every response of the sampler's data set, float64 [responses]; None where there is
        no reference."""


@dataclass(frozen=True, eq=False)
class ModelReference:
    """A frozen model, run forward over the rows."""

    fingerprint: str
    chunks: list[torch.nn.Module]
    loss: LossConfig
    world: World
    rounding: float

    def attach(self, rows: list[MicroBatch], batches: list[TrainBatch]) -> list[TrainBatch]:
        return with_reference(self.chunks, batches, self.loss)

    def score(self, sampler: Sampler) -> np.ndarray:
        return score_dataset(self.chunks, sampler, self.loss, self.world)


@dataclass(frozen=True, eq=False)
class PrecomputedReference:
    """Log-probabilities by data set, as sidecar.py reads them."""

    fingerprint: str
    dataset: PreferenceDataset
    logps: dict[str, np.ndarray]
    rounding: float

    def attach(self, rows: list[MicroBatch], batches: list[TrainBatch]) -> list[TrainBatch]:
        known = self.logps[self.dataset.fingerprint]
        found = []
        for row, batch in zip(rows, batches, strict=True):
            logps = known[response_index(self.dataset, row)]
            found.append(batch.with_reference(on_device(logps, batch.tokens.device)))
        return found

    def score(self, sampler: Sampler) -> np.ndarray:
        return self.logps[sampler.dataset.fingerprint]


@dataclass(frozen=True)
class NoReference:
    """Of a reward model, whose scores are rewards by themselves."""

    fingerprint: str = ""
    rounding: float = 0.0

    def attach(self, rows: list[MicroBatch], batches: list[TrainBatch]) -> list[TrainBatch]:
        return batches

    def score(self, sampler: Sampler) -> None:
        return None


def response_index(dataset: PreferenceDataset, row: MicroBatch) -> np.ndarray:
    """Where a row's responses stand among all of the data set, int64 [R]."""
    groups, responses = row.response_ids[:, 0], row.response_ids[:, 1]
    return np.asarray(dataset.group_responses)[groups] + responses


def score(chunks: list[torch.nn.Module], batches: list[TrainBatch], loss: LossConfig) -> list:
    """Response log-probabilities of every row, float64 [R] each, in the rows' order."""
    return run_schedule(chunks, batches, loss, forward_only=True)


def with_reference(
    chunks: list[torch.nn.Module], batches: list[TrainBatch], loss: LossConfig
) -> list[TrainBatch]:
    """The same rows with the reference model's log-probabilities, from one pass over them."""
    logps = score(chunks, batches, loss)
    return [b.with_reference(x) for b, x in zip(batches, logps, strict=True)]


def freeze(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Make models that are never trained: no gradients, evaluation mode."""
    return [chunk.eval().requires_grad_(False) for chunk in chunks]


def score_dataset(
    chunks: list[torch.nn.Module],
    sampler: Sampler,
    loss: LossConfig,
    world: World,
    partial: PartialScores | None = None,
) -> np.ndarray:
    """Log-probability of every response of the sampler's data set, or a reward model's score of
    it, float64 [responses].

    Responses are numbered through the whole data set in its order. One that runs several
    times (sharing `none`, several pairs) gets the mean of its runs. Every rank runs its rows
    and returns the whole; a response that never runs (one without a pair, under `none` or
    `pair`) is NaN. `partial` takes scoring up where it was left, and keeps what is done.
    """
    dataset = sampler.dataset
    first, sums = world.once(lambda: (partial.step, partial.sums) if partial else (0, None))
    if sums is None:
        sums = np.zeros((2, len(dataset.response_lengths)))
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    num_steps = sampler.composition.num_steps(1)
    with closing(Feed(sampler, world, unwrap(chunks[0]).config, num_steps)) as feed:
        for start in range(first, num_steps, SAVE_STEPS):
            stop = min(start + SAVE_STEPS, num_steps)
            found = np.zeros_like(sums)
            for step in range(start, stop):
                world.beat(f"scoring, step {step + 1} of {num_steps}")
                _add_scores(chunks, dataset, feed.step(step), loss, found)
            sums += world.sum(torch.from_numpy(found).to(world.device)).cpu().numpy()
            if partial is not None:
                partial.sums = sums
                world.once(lambda stop=stop: partial.save(stop))
    for chunk, training in zip(chunks, was_training, strict=True):
        chunk.train(training)
    with np.errstate(invalid="ignore"):
        return sums[0] / sums[1]


def _add_scores(
    chunks: list[torch.nn.Module],
    dataset: PreferenceDataset,
    step: PreparedStep,
    loss: LossConfig,
    sums: np.ndarray,
) -> None:
    """Add this rank's rows of a step to `sums`: log-probabilities, and how often each ran."""
    found = score(chunks, step.batches, loss)
    for row, logps in zip(step.rows, found, strict=True):
        index = response_index(dataset, row)
        np.add.at(sums[0], index, logps.cpu().numpy())
        np.add.at(sums[1], index, 1)
