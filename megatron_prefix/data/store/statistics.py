"""Statistics of a data set: counts, lengths, and tokens under each sharing mode."""

from __future__ import annotations

from itertools import cycle

import numpy as np

from megatron_prefix.data.store.blocks import Block, starts
from megatron_prefix.data.store.manifest_keys import COUNTS, MISMATCH_COUNTS, SHARING_TOKENS
from megatron_prefix.data.store.pruning import MISMATCH, ROLES, own_block
from megatron_prefix.data.tree import PrefixTree

QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def path_lengths(tree: PrefixTree) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each response's whole path, and of its prompt, both int64 [R]."""
    lengths = tree.node_lengths.tolist()
    ends: list[int] = []
    for length, parent in zip(lengths, tree.parents.tolist(), strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    depth = np.array(ends, np.int64)
    first = tree.response_first
    return depth[tree.response_last], depth[first] - np.array(lengths, np.int64)[first]


def sharing_tokens(block: Block) -> dict[str, int]:
    """Tokens of a block's groups under each sharing mode.

    A prompt of 10 tokens with responses of 2 and 3 and one pair: `none` and `response` 12 + 13 =
    25, `pair` and `tree` 10 + 2 + 3 = 15.
    """
    columns = block.columns
    # Pairs name responses within their group; `sides` numbers them within the block.
    first = np.repeat(starts(columns["group_responses"]), columns["group_pairs"])
    sides = columns["pair_responses"] + first[:, None]
    lengths, prompts = columns["response_lengths"], columns["response_prompts"]
    unshared = int(lengths[sides].sum(dtype=np.int64))
    return {
        "none": unshared,
        "response": int(lengths.sum(dtype=np.int64)),
        "pair": unshared - int(prompts[sides].min(axis=1).sum(dtype=np.int64)),
        "tree": len(block.tokens),
    }


class Histogram:
    """Exact quantiles of non-negative integers; its memory grows with the largest value only."""

    def __init__(self) -> None:
        self._counts = np.zeros(256, np.int64)

    def add(self, values: np.ndarray) -> None:
        if len(values) and (top := int(values.max())) >= len(self._counts):
            grown = np.zeros(max(top + 1, 2 * len(self._counts)), np.int64)
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        self._counts += np.bincount(values, minlength=len(self._counts))

    def summary(self) -> dict[str, float]:
        """min, median, p95, p99, max (always a value that occurs, at ties the lower) and mean."""
        total = int(self._counts.sum())
        if not total:
            return {}
        # Values 2, 2, 5, 9: below[2] is 2, below[5] is 3, below[9] is 4. The median is the first
        # value with at least 0.5 * 4 = 2 values up to it, which is 2.
        below = np.cumsum(self._counts)
        wanted = [max(int(np.ceil(q * total)), 1) for q in QUANTILES.values()]
        values = np.searchsorted(below, wanted).tolist()
        mean = float(np.arange(len(self._counts)) @ self._counts) / total
        return {**dict(zip(QUANTILES, values, strict=True)), "mean": round(mean, 3)}

    def tally(self) -> dict[str, int]:
        """How often each value occurs; values that do not occur are left out."""
        values = np.flatnonzero(self._counts)
        counts = self._counts[values]
        return {str(v): int(n) for v, n in zip(values.tolist(), counts.tolist(), strict=True)}

    def bins(self, most: int) -> dict[str, list[int]]:
        """{"edges", "counts"}: at most `most` bins, of one round width up to p99 and one above.

        Bin i holds values from edges[i] up to, not including, edges[i + 1]. Values 0 to 99 in at
        most 6 bins have the edges 0, 20, 40, 60, 80, 100.
        """
        summary = self.summary()
        if not summary:
            return {"edges": [], "counts": []}
        low, high, top = (int(summary[name]) for name in ("min", "p99", "max"))
        width, start = _round_width(low, high, most - 1)
        edges = list(range(start, high // width * width + width + 1, width))
        if top >= edges[-1]:
            edges.append(top + 1)
        counts = np.add.reduceat(self._counts[: top + 1], edges[:-1])
        return {"edges": edges, "counts": counts.tolist()}


def _round_width(low: int, high: int, most: int) -> tuple[int, int]:
    """The smallest of 1, 2, 5, 10, 20, … that needs at most `most` bins, and the first edge."""
    width, factors = 1, cycle((2, 2.5, 2))
    while high // width - low // width + 1 > most:
        width = int(width * next(factors))
    return width, low // width * width


class Statistics:
    """Running totals over the groups of a data set."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self.tokens = dict.fromkeys(SHARING_TOKENS, 0)
        self._lengths = {name: Histogram() for name in ("prompt", "response", "path", "tree")}

    def add(self, block: Block) -> None:
        """Add all groups of a block. Mismatches are part of `counts`, which are those of the files,
        and are counted there by themselves; tokens by sharing mode and lengths are without them."""
        columns = block.columns
        sizes = (columns["group_nodes"], columns["response_last"], columns["pair_weights"])
        nodes = len(block.node_lengths)
        counted = (len(sizes[0]), nodes, len(sizes[1]), len(sizes[2]), len(block.tokens))
        for name, count in zip(COUNTS, counted, strict=True):
            self.counts[name] += count
        if (roles := block.columns.get(ROLES)) is not None and (roles == MISMATCH).any():
            whole, block = block, own_block(block)
            own = (
                len(roles) - len(block.columns[ROLES]),
                len(whole.node_lengths) - len(block.node_lengths),
                len(whole.tokens) - len(block.tokens),
            )
            for name, count in zip(MISMATCH_COUNTS, own, strict=True):
                self.counts[name] = self.counts.get(name, 0) + count
        columns = block.columns
        for name, count in sharing_tokens(block).items():
            self.tokens[name] += count
        lengths, prompts = columns["response_lengths"], columns["response_prompts"]
        trees = np.add.reduceat(block.node_lengths, starts(columns["group_nodes"]))
        parts = (prompts, lengths - prompts, lengths, trees)
        for histogram, values in zip(self._lengths.values(), parts, strict=True):
            histogram.add(values)

    def lengths(self) -> dict[str, dict[str, float]]:
        """Lengths in tokens of prompts, responses, paths (one per response) and trees."""
        return {name: histogram.summary() for name, histogram in self._lengths.items()}
