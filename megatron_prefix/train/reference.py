"""Log-probabilities without gradients: the frozen reference, and whole data sets."""

from __future__ import annotations

import numpy as np
import torch

from megatron_prefix.config import LossConfig
from megatron_prefix.data.sampler import Sampler
from megatron_prefix.train.step import TrainBatch, run_schedule, to_device


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
    device: torch.device,
) -> np.ndarray:
    """Log-probability of every response of the sampler's data set, float64 [responses].

    Responses are numbered through the whole data set in its order. One that runs several
    times (sharing `none`, several pairs) gets the mean of its runs.
    """
    dataset = sampler.dataset
    totals, runs = np.zeros((2, len(dataset.response_lengths)))
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    for step in range(sampler.composition.num_steps(1)):
        rows = sampler.micro_batches(sampler.step(step))
        found = score(chunks, [to_device(row, device) for row in rows], loss)
        for row, logps in zip(rows, found, strict=True):
            index = np.asarray(dataset.group_responses)[row.response_ids[:, 0]]
            index = index + row.response_ids[:, 1]
            np.add.at(totals, index, logps.cpu().numpy())
            np.add.at(runs, index, 1)
    for chunk, training in zip(chunks, was_training, strict=True):
        chunk.train(training)
    return totals / np.maximum(runs, 1)
