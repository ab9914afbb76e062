"""Seeded orders: permutations that are a function of (data set fingerprint, seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np

Order = Callable[[int], np.ndarray]
"""The groups of an epoch in its order, int64."""


def seeded(*key: object) -> np.random.Generator:
    """A random stream that depends on `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@lru_cache(maxsize=2)
def epoch_order(num_groups: int, fingerprint: str, seed: int, epoch: int) -> np.ndarray:
    """The groups of an epoch in its order, int64 [groups]."""
    return seeded("order", fingerprint, seed, epoch).permutation(num_groups)


def order_by_length(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The groups of `order` from short to long; groups of equal length stay in its order."""
    return order[np.argsort(lengths[order], kind="stable")]
