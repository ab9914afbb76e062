"""Weights of several references, step by step.

Every rule is a pure function of the plan (which pairs each step has), the sidecars, a seed and the
step. So all ranks have the same weights without communication, and a resumed run has those that it
would have had. No rule but `adaptive`, which is in objectives/reference_mixtures.py, reads a label
of the step that its weights are for.

The two online and the two validation rules are named and described by Wu and Echarghaoui 2025
(arXiv 2512.10040), whose formulas were not available: those here are ours. That the confidence is
taken per token is from a summary of the paper.

Shapes: K references, R responses of a data set, P its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_prefix.data.steps import Sampler

PairsOfStep = Callable[[int], np.ndarray]
"""The pairs of a step, as indices among those of the data set, in the order of the plan."""


class StepWeights(Protocol):
    """The weights of each step, and what they were made of."""

    def weights(self, step: int) -> np.ndarray:
        """Float64 [K] of the step, counted from 0; they sum to 1."""

    def counts(self, step: int) -> list:
        """What is known before the step, for the check of a resumed run."""


@dataclass(frozen=True, eq=False)
class FixedWeights:
    """The same weights in every step."""

    fixed: np.ndarray

    def weights(self, step: int) -> np.ndarray:
        return self.fixed

    def counts(self, step: int) -> list:
        return []


@dataclass(frozen=True, eq=False)
class SlidingWindow:
    """Accuracy of each reference on the last pairs of earlier steps, divided by the sum.

    Of the `window` pairs that came last before the step (all, if there are fewer), the share that
    the reference prefers correctly, a tie counting one half. Without earlier pairs, or if no
    reference is ever correct: equal weights.
    """

    preferred: np.ndarray
    """[K, P]: 1 if the reference prefers the chosen response, 1/2 at a tie, else 0."""
    pairs_of_step: PairsOfStep
    window: int

    def weights(self, step: int) -> np.ndarray:
        return normalised(self.preferred[:, self._recent(step)].sum(axis=1))

    def counts(self, step: int) -> list:
        return self.preferred[:, self._recent(step)].sum(axis=1).tolist()

    def _recent(self, step: int) -> np.ndarray:
        # Steps with pairs [7 3] [5] [2 9], window 4, step 3: [3 5 2 9]
        parts: list[np.ndarray] = []
        missing = self.window
        while step > 0 and missing > 0:
            step -= 1
            pairs = self.pairs_of_step(step)
            parts.insert(0, pairs[max(0, len(pairs) - missing) :])
            missing -= len(parts[0])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@dataclass(eq=False)
class Thompson:
    """One reference per step, drawn by Thompson sampling.

    Each reference has a Beta(1 + successes, 1 + failures) distribution of how often it prefers
    correctly. A step draws a number from each, and the reference with the largest has weight 1.
    After the step, its successes and failures on the step's pairs are added; a tie is half of
    each. The numbers of step t depend on (seed, t) and the counts alone.
    """

    preferred: np.ndarray
    """[K, P], as in SlidingWindow."""
    pairs_of_step: PairsOfStep
    seed: int
    _step: int = 0
    _counts: np.ndarray = field(init=False)
    """[K, 2]: successes and failures before `_step`. Steps are replayed from there."""

    def __post_init__(self) -> None:
        self._counts = np.zeros((len(self.preferred), 2))

    def weights(self, step: int) -> np.ndarray:
        weights = np.zeros(len(self.preferred))
        weights[self._drawn(step, self._before(step))] = 1.0
        return weights

    def counts(self, step: int) -> list:
        return self._before(step).tolist()

    def _before(self, step: int) -> np.ndarray:
        if step < self._step:
            self._step, self._counts = 0, np.zeros_like(self._counts)
        while self._step < step:
            drawn = self._drawn(self._step, self._counts)
            values = self.preferred[drawn, self.pairs_of_step(self._step)]
            self._counts[drawn] += values.sum(), (1 - values).sum()
            self._step += 1
        return self._counts

    def _drawn(self, step: int, counts: np.ndarray) -> int:
        stream = np.random.default_rng([self.seed, step])
        return int(stream.beta(1 + counts[:, 0], 1 + counts[:, 1]).argmax())


def normalised(values: np.ndarray) -> np.ndarray:
    """`values` from 0, divided by their sum; equal weights if it is 0."""
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), 1 / len(values))


def preferred_chosen(logps: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Whether each reference finds the chosen response more probable, [K, P]: 1, 0, or 1/2.

    `logps` are [K, R] and `sides` [P, 2] (`PreferenceDataset.pair_sides`).
    """
    return (np.sign(logps[:, sides[:, 0]] - logps[:, sides[:, 1]]) + 1) / 2


def validation_accuracy(preferred: Sequence[np.ndarray]) -> np.ndarray:
    """Share of held-out pairs that each reference prefers correctly, divided by the sum; [K].

    `preferred` has an array [K, P] for each held-out data set.
    """
    return normalised(np.concatenate(preferred, axis=1).sum(axis=1))


def validation_confidence(gaps: Sequence[np.ndarray]) -> np.ndarray:
    """By how much each reference prefers the chosen response, per token, over held-out pairs; [K].

        w_k = max(0, sum over pairs of (log pi_k(chosen) / n_c - log pi_k(rejected) / n_r)),
        divided by the sum over references; equal weights if all are 0

    `gaps` has the summands [K, P] of each held-out data set.
    """
    return normalised(np.concatenate(gaps, axis=1).sum(axis=1).clip(min=0))


def gaps_per_token(logps: np.ndarray, sides: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """Summands of `validation_confidence`, [K, P]; `num_tokens` are the responses' own, [R]."""
    per_token = logps / num_tokens
    return per_token[:, sides[:, 0]] - per_token[:, sides[:, 1]]


def pairs_of_step(sampler: Sampler, step: int) -> np.ndarray:
    """The pairs of a step of the plan. A group that is in the step twice has its pairs twice."""
    groups, offsets = sampler.composition.groups(step), sampler.dataset.group_pairs
    parts = [np.arange(offsets[group], offsets[group + 1]) for group in groups]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
