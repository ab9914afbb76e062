"""Mixtures: the steps of several data sets. Groups are numbered through all sets, as joined.

**Weights.** Each set gives its share of every step. After t steps of G groups, a set with share s
has given round(t G s) of them, where of all sets together exactly t G are given: every set gives
the whole part of its t G s, and the largest remainders give one more. With shares 1/2, 1/3, 1/6 and
G = 4:

    t                    1                2                3
    t G s                2    1.33 0.67   4    2.67 1.33   6    4    2
    given after t        2    1    1      4    3    1      6    4    2
    so step t takes      2    1    1      2    2    0      2    1    1

Each set runs through its own permutations, one after another: no group comes again before its set
is through.

**Epochs.** A set with E epochs gives every group E times, and of a fraction of an epoch as many
groups as it rounds to, drawn by the seed. All of them are in one permutation.

Both are a function of (fingerprints of the sets in their order, seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from megatron_prefix.data.steps.compositions.order import epoch_order, seeded


def exact(number: float) -> Fraction:
    """The decimal number as it is written: 0.1 is 1/10."""
    return Fraction(repr(float(number)))


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportion, from the decimals as written: [0.5, 0.25] -> [2, 1]."""
    fractions = [exact(weight) for weight in weights]
    factor = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * factor) for fraction in fractions]


def largest_remainders(total: int, shares: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `shares` into whole numbers: of equal remainders the first
    gets one more.

    8 by [3, 2, 1] is 4, 2.67, 1.33: [4, 3, 1].
    """
    whole = sum(shares)
    divided = [divmod(total * share, whole) for share in shares]
    counts = [count for count, _ in divided]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-divided[i][1], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True, eq=False)
class WeightedSets:
    """`batch_size` groups per step from sets of `sizes` groups, in proportion to `weights`."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    batch_size: int
    fingerprint: str
    seed: int
    _given: list[list[int]] = field(default_factory=list, init=False, repr=False)

    def groups(self, step: int) -> np.ndarray:
        before, after = self.given(step), self.given(step + 1)
        parts = [
            self._stream(index, start, stop)
            for index, (start, stop) in enumerate(zip(before, after, strict=True))
        ]
        return np.concatenate(parts)

    def num_steps(self, epochs: int) -> int:
        """Steps that take as many groups as `epochs` times all sets have; there are always more."""
        return -(-sum(self.sizes) * epochs // self.batch_size)

    def given(self, steps: int) -> list[int]:
        """How many groups each set has given after `steps` steps."""
        shares = self._shares
        if min(shares) * self.batch_size >= sum(shares):  # a step has a group of every set
            return largest_remainders(steps * self.batch_size, shares)
        # Rounding by largest remainders may then take back a group that a set has given: with
        # shares 3/7, 3/7, 1/7 it gives [4, 4, 2] of 10 groups and [5, 5, 1] of 11. A set keeps what
        # it has given, so each step follows from the one before it.
        if not self._given:
            self._given.append([0] * len(shares))
        while len(self._given) <= steps:
            total = len(self._given) * self.batch_size
            wanted = largest_remainders(total, shares)
            self._given.append(_without_taking_back(self._given[-1], wanted))
        return self._given[steps]

    @cached_property
    def _shares(self) -> list[int]:
        return whole_numbers(self.weights)

    def _stream(self, index: int, start: int, stop: int) -> np.ndarray:
        """Groups `start` to `stop` of the endless permutations of set `index`."""
        size, first = self.sizes[index], sum(self.sizes[:index])
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, size)
            part = self._order(index, epoch)[offset : offset + stop - start]
            parts.append(first + part)
            start += len(part)
        return np.concatenate(parts)

    @lru_cache(maxsize=32)  # noqa: B019 (a run has one composition, alive as long as the run)
    def _order(self, index: int, epoch: int) -> np.ndarray:
        key = f"{self.fingerprint}/set {index}"
        return seeded("order", key, self.seed, epoch).permutation(self.sizes[index])


def _without_taking_back(before: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """`wanted`, but no number below that of `before`: what is too much then is taken, one by one,
    from the number that grows most (of equal ones from the last).

    before [4, 4, 2], wanted [5, 5, 1]: [5, 4, 2]
    """
    counts = [max(pair) for pair in zip(before, wanted, strict=True)]
    for _ in range(sum(counts) - sum(wanted)):
        growth = [now - then for now, then in zip(counts, before, strict=True)]
        counts[max(range(len(counts)), key=lambda i: (growth[i], i))] -= 1
    return counts


@dataclass(frozen=True)
class RepeatedSets:
    """The order of an epoch in which the groups of set i come `epochs[i]` times."""

    sizes: tuple[int, ...]
    epochs: tuple[float, ...]
    fingerprint: str
    seed: int

    def __len__(self) -> int:
        return sum(map(self._count, range(len(self.sizes))))

    def __call__(self, epoch: int) -> np.ndarray:
        """Groups in their order, int64."""
        parts = []
        for index, size in enumerate(self.sizes):
            first, count = sum(self.sizes[:index]), self._count(index)
            whole = np.tile(np.arange(size), count // size)
            key = f"{self.fingerprint}/set {index}"
            some = epoch_order(size, key, self.seed, epoch)[: count % size]
            parts += [first + whole, first + some]
        groups = np.concatenate(parts)
        return groups[epoch_order(len(groups), self.fingerprint, self.seed, epoch)]

    def _count(self, index: int) -> int:
        """Groups that a set gives: its size times its epochs, halves rounded up."""
        return math.floor(self.sizes[index] * exact(self.epochs[index]) + Fraction(1, 2))
