"""Many groups at once, as the columns of a data set: what builders make and the writer appends.

    two groups of 2 and 1 responses, of 3 and 2 nodes
    group_nodes [3, 2]    group_responses [2, 1]    node_parents [-1, 0, 0, -1, 0]

The three columns that are offsets on disk are counts a group here, everything else is as it is
written. Shape suffixes: G groups, M nodes, R responses, P pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_prefix.data.columns import COLUMNS, OFFSETS
from megatron_prefix.data.tree import PrefixTree

if TYPE_CHECKING:
    from megatron_prefix.data.store import PreferenceDataset


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """tokens_T, node_lengths_M (tokens), and the columns by name."""

    tokens: np.ndarray
    node_lengths: np.ndarray
    columns: dict[str, np.ndarray]

    @property
    def num_groups(self) -> int:
        return len(self.columns["group_nodes"])

    @classmethod
    def of_trees(
        cls,
        trees: Sequence[PrefixTree],
        records: Sequence[int],
        num_records: Sequence[int] | None = None,
    ) -> Block:
        """Groups of which the i-th comes from input record `records[i]`, and holds
        `num_records[i]` records (one where not given)."""

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(tree, name) for tree in trees])

        lengths = np.concatenate([np.diff(tree.node_offsets) for tree in trees])
        columns = {
            "group_nodes": np.array([len(tree.parents) for tree in trees]),
            "group_responses": np.array([len(tree.response_last) for tree in trees]),
            "group_pairs": np.array([len(tree.pairs) for tree in trees]),
            "group_records": np.asarray(records, np.int64),
            "group_num_records": np.asarray(num_records or [1] * len(trees), np.int64),
            "node_parents": joined("parents"),
            "response_first": joined("response_first"),
            "response_last": joined("response_last"),
            "response_sets": joined("response_sets"),
            "response_ranks": joined("ranks"),
            "response_scores": joined("scores"),
            "pair_responses": joined("pairs"),
            "pair_weights": joined("pair_weights"),
            "pair_margins": joined("pair_margins"),
        }
        ends = node_ends(lengths, columns["node_parents"], columns["group_nodes"])
        first_nodes = np.repeat(starts(columns["group_nodes"]), columns["group_responses"])
        first, last = (first_nodes + columns[f"response_{end}"] for end in ("first", "last"))
        columns["response_lengths"] = ends[last]
        columns["response_prompts"] = ends[first] - lengths[first]
        columns = {name: np.asarray(columns[name], COLUMNS[name][0]) for name in COLUMNS}
        return cls(
            tokens=_narrow(joined("tokens")), node_lengths=lengths.astype("<i4"), columns=columns
        )

    @classmethod
    def of_dataset(cls, dataset: PreferenceDataset, start: int, stop: int) -> Block:
        """Groups `start` to `stop` of a data set."""
        spans = {"group": (start, stop)}
        for name in ("node", "response", "pair"):
            offsets = getattr(dataset, f"group_{name}s")
            spans[name] = int(offsets[start]), int(offsets[stop])
        columns = {}
        for name in COLUMNS:
            first, last = spans[name.split("_")[0]]
            column = getattr(dataset, name)
            columns[name] = (
                np.diff(column[first : last + 1]) if name in OFFSETS else column[first:last]
            )
        first, last = spans["node"]
        lengths = dataset.node_lengths[first:last]
        token = int(dataset.node_pointers[first]) // dataset.tokens.itemsize
        tokens = dataset.tokens[token : token + int(lengths.sum(dtype=np.int64))]
        return cls(tokens=tokens, node_lengths=lengths, columns=columns)


def _narrow(tokens: np.ndarray) -> np.ndarray:
    """As uint16 where all ids fit: blocks travel between processes."""
    fits = 0 <= tokens.min() and tokens.max() < 1 << 16
    return tokens.astype(np.uint16) if fits else tokens


def starts(counts: np.ndarray) -> np.ndarray:
    """[3, 2, 4] -> [0, 3, 5], int64."""
    return np.cumsum(counts, dtype=np.int64) - counts


def node_ends(lengths_M: np.ndarray, parents_M: np.ndarray, counts_G: np.ndarray) -> np.ndarray:
    """Tokens from the root to each node's end, int64 [M]; parents count from the group's first.

    Every round adds what stands above and looks twice as far up, so that a tree of depth d takes
    log2 d rounds.
    """
    first_nodes = np.repeat(starts(counts_G), counts_G)
    root = len(lengths_M)  # one more entry, of length 0 and its own parent, above all roots
    above = np.append(np.where(parents_M < 0, root, first_nodes + parents_M), root)
    ends = np.append(lengths_M, 0).astype(np.int64)
    while (above != root).any():
        ends, above = ends + ends[above], above[above]
    return ends[:-1]
