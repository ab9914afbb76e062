"""Spans: a data set in parts of many groups, so that reading all of it takes little memory.

    for span in all_spans(dataset):
        span["node_parents"]       # of groups span.start to span.stop

A span has about NODES nodes and at least one group. On disk, nodes and responses are numbered
within their group; `parents` and `own_nodes` number them within the span. Shape suffixes: G groups,
M nodes, R responses, P pairs of a span.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_prefix.data.store.blocks import Block, node_ends, starts
from megatron_prefix.data.store.mapped import MappedFiles

NODES = 1 << 17


@dataclass(frozen=True, eq=False)
class Span:
    """Groups `start` to `stop` of a data set: their columns, and values computed from them."""

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
    def group_of_group(self) -> np.ndarray:
        """Each group, counted from the span's first, [G]."""
        return np.arange(self.stop - self.start)

    @cached_property
    def group_of_node(self) -> np.ndarray:
        """Group of each node, counted from the span's first, [M]."""
        return np.repeat(np.arange(self.stop - self.start), self["group_nodes"])

    @cached_property
    def group_of_response(self) -> np.ndarray:
        """Group of each response, counted from the span's first, [R]."""
        return np.repeat(np.arange(self.stop - self.start), self["group_responses"])

    @cached_property
    def group_of_pair(self) -> np.ndarray:
        """Group of each pair, counted from the span's first, [P]."""
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
        """Nodes that carry loss: first the last node of every response, then their parents, and so
        on up to `response_first`.

        Parents must come before their children, so that the walk ends.
        """
        node, top = self.own_nodes("last"), self.own_nodes("first")
        while len(node):
            yield node
            below = node > top
            node, top = self.parents[node[below]], top[below]

    def per_group(self, values: np.ndarray, of: str = "nodes") -> np.ndarray:
        """Sums over each group of values per node (or per response: `of="responses"`)."""
        return np.add.reduceat(values, starts(self[f"group_{of}"]))


def all_spans(dataset: MappedFiles, nodes: int = NODES) -> Iterator[Span]:
    """All groups in order, in spans of about `nodes` nodes."""
    offsets, start = dataset.group_nodes, 0
    while start < len(dataset):
        # group_nodes [0 3 5 9] in spans of 5 nodes: reach 2, so groups 0 and 1; then group 2 alone.
        reach = np.searchsorted(offsets, int(offsets[start]) + nodes, "right") - 1
        stop = min(max(int(reach), start + 1), len(dataset))
        yield Span(start, stop, dataset.block(start, stop))
        start = stop
