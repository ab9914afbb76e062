"""A data set, a span of groups at a time, so that what reads all of it holds little of it.

    for block in spans(dataset):
        block.columns["node_parents"]       # of groups block.start to block.stop

A span has about NODES nodes, and at least one group. Columns that count from a group's first node
or response are lifted to the span's here: `first_nodes` and its like. Shape suffixes: G groups, M
nodes, R responses, P pairs of a span.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_prefix.data.store.blocks import Block, node_ends, starts
from megatron_prefix.data.store.dataset import PreferenceDataset

NODES = 1 << 18


@dataclass(frozen=True, eq=False)
class Span:
    """Groups `start` to `stop` of a data set, and what follows from their columns."""

    start: int
    stop: int
    block: Block

    def __getitem__(self, name: str) -> np.ndarray:
        return self.block.columns[name]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each node, int64 [M]."""
        return self.block.node_lengths.astype(np.int64)

    @cached_property
    def group_of_node(self) -> np.ndarray:
        """[M], counted from the span's first group."""
        return np.repeat(np.arange(self.stop - self.start), self["group_nodes"])

    @cached_property
    def group_of_response(self) -> np.ndarray:
        """[R], counted from the span's first group."""
        return np.repeat(np.arange(self.stop - self.start), self["group_responses"])

    @cached_property
    def group_of_pair(self) -> np.ndarray:
        """[P], counted from the span's first group."""
        return np.repeat(np.arange(self.stop - self.start), self["group_pairs"])

    @cached_property
    def parents(self) -> np.ndarray:
        """Parent of each node, counted from the span's first node; -1 at a root. int64 [M]."""
        local = self["node_parents"].astype(np.int64)
        first = starts(self["group_nodes"])[self.group_of_node]
        return np.where(local < 0, -1, local + first)

    def own_nodes(self, end: str) -> np.ndarray:
        """`response_first` or `response_last`, counted from the span's first node, [R]."""
        return self[f"response_{end}"] + starts(self["group_nodes"])[self.group_of_response]

    @cached_property
    def ends(self) -> np.ndarray:
        """Tokens from the root to each node's end, int64 [M]."""
        return node_ends(self.lengths, self["node_parents"], self["group_nodes"])

    @cached_property
    def depths(self) -> np.ndarray:
        """Nodes from the root to each node, itself included, int64 [M]."""
        ones = np.ones(len(self.lengths), np.int64)
        return node_ends(ones, self["node_parents"], self["group_nodes"])

    def walk(self) -> Iterator[np.ndarray]:
        """Nodes that carry loss, each response's next one up in every round.

        Ends below `response_first` where that is no ancestor: every parent must stand before its
        child.
        """
        node, top = self.own_nodes("last"), self.own_nodes("first")
        while len(node):
            yield node
            below = node > top
            node, top = self.parents[node[below]], top[below]

    def per_group(self, values: np.ndarray, of: str = "nodes") -> np.ndarray:
        """Sums of values of nodes (or `responses`) over each group, which has at least one."""
        return np.add.reduceat(values, starts(self[f"group_{of}"]))


def spans(dataset: PreferenceDataset, nodes: int = NODES) -> Iterator[Span]:
    """All groups in order, in spans of about `nodes` nodes."""
    offsets, start = dataset.group_nodes, 0
    while start < len(dataset):
        reach = np.searchsorted(offsets, int(offsets[start]) + nodes, "right") - 1
        stop = min(max(int(reach), start + 1), len(dataset))
        yield Span(start, stop, dataset.block(start, stop))
        start = stop
