"""Rows -> MicroBatch: tokens, layout and targets of one row, as a few integer arrays.

A row [p p | a a | b b b] with responses a and b of the prompt p has the targets

    source_row    1  1  2  4  5      row 1 predicts the first token of both responses
    target_token  a0 b0 a1 b1 b2
    response      0  1  0  1  1

sorted by source row, so that rows that predict nothing are never projected and row 1 is
projected once. A reward model scores the last row of each response instead: rows 3 and 6, one
target a response. Shapes: T tokens, N targets, R responses, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prefix.data.steps.sharing import View
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.layout import TreeLayout

PADDING_TOKEN = 0
Targets = Callable[[PrefixTree], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""(source_row, target_token, response) of one tree: `tree_targets` or `score_targets`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """One row, ready for the model.

    tokens_T int64 with padding; `layout` covers them all; source_row_N, target_token_N,
    response_N int64 as above. `response_ids_R2` are (group, response in the group);
    pairs_P2 index this row's responses; pair_weights_P are what each pair adds to the
    step's normaliser. `num_tokens` counts tokens without padding. served_T is how many of the
    row's responses each token is part of, 0 for padding; only routers of experts ask for it.
    """

    tokens: np.ndarray
    layout: TreeLayout
    source_row: np.ndarray
    target_token: np.ndarray
    response: np.ndarray
    response_ids: np.ndarray
    response_tokens: np.ndarray
    """Own tokens of each response, int64 [R]."""
    pairs: np.ndarray
    pair_weights: np.ndarray
    pair_margins: np.ndarray
    num_tokens: int
    served: np.ndarray | None = None

    @property
    def num_responses(self) -> int:
        return len(self.response_ids)

    @property
    def num_projected(self) -> int:
        """Rows that become logits."""
        return len(np.unique(self.source_row))


@dataclass(frozen=True, kw_only=True)
class RowItem:
    """One bundle of a row: its group, its tokens, and its pairs' weights in the loss."""

    group: int
    view: View
    pair_weights: np.ndarray


def tree_targets(tree: PrefixTree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source_row, target_token, response) of one tree, rows counted from its first token."""
    ends = tree.node_offsets[1:]
    rows, tokens, responses = [], [], []
    for response in range(tree.num_responses):
        for node in tree.response_nodes(response):
            start, end = tree.node_offsets[node], tree.node_offsets[node + 1]
            source = np.arange(start - 1, end - 1)
            source[0] = ends[tree.parents[node]] - 1
            rows.append(source)
            tokens.append(tree.tokens[start:end])
            responses.append(np.full(end - start, response))
    return tuple(np.concatenate(x).astype(np.int64) for x in (rows, tokens, responses))


def score_targets(tree: PrefixTree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source_row, target_token, response) of one tree for a reward model.

    The row of each response's last token, once a response; no token is predicted, and 0 stands
    for it.
    """
    rows = tree.node_offsets[1:][tree.response_last].astype(np.int64) - 1
    return rows, np.zeros_like(rows), np.arange(tree.num_responses, dtype=np.int64)


def responses_served(tree: PrefixTree) -> np.ndarray:
    """How many responses each token is part of, prompt or own, int64 [tokens]."""
    counts = np.bincount(tree.response_last, minlength=tree.num_nodes)
    for node in range(tree.num_nodes - 1, -1, -1):  # children stand behind their parents
        if tree.parents[node] >= 0:
            counts[tree.parents[node]] += counts[node]
    return np.repeat(counts, tree.node_lengths)


def collate_packed(
    items: Sequence[RowItem], multiple: int = 1, targets: Targets = tree_targets
) -> MicroBatch:
    """One row of trees, its length rounded up to `multiple` by a padding tree without loss.

    Without items it is an empty row: `multiple` tokens of padding.
    """
    length = sum(item.view.tree.num_tokens for item in items)
    padding = max(-(-length // multiple), 1) * multiple - length
    parts = [_Part.whole(item.view.tree) for item in items]
    if padding:
        parts.append(_Part(np.full(padding, PADDING_TOKEN), [padding], [-1]))
    return _assemble(items, parts, targets)


def collate_padded(
    items: Sequence[RowItem], multiple: int = 1, targets: Targets = tree_targets
) -> MicroBatch:
    """Sequences right-padded to the longest of them, one after another.

    Padding continues its sequence, so attention pays for it as it does in a padded batch.
    """
    sequences = [part for item in items for part in _Part.roots(item.view.tree)]
    longest = max((len(s.tokens) for s in sequences), default=0)
    longest = max(-(-longest // multiple), 1) * multiple
    parts = [s.padded(longest) for s in sequences]
    if not parts:
        parts = [_Part(np.full(longest, PADDING_TOKEN), [longest], [-1])]
    return _assemble(items, parts, targets)


@dataclass(frozen=True)
class _Part:
    """Consecutive nodes of a row; `num_real` tokens of it belong to the data."""

    tokens: np.ndarray
    lengths: list[int]
    parents: list[int]
    num_real: int = 0

    @classmethod
    def whole(cls, tree: PrefixTree) -> _Part:
        lengths, parents = tree.node_lengths.tolist(), tree.parents.tolist()
        return cls(tree.tokens, lengths, parents, tree.num_tokens)

    @classmethod
    def roots(cls, tree: PrefixTree) -> list[_Part]:
        """One part for every root of the tree."""
        starts = np.flatnonzero(tree.parents < 0).tolist()
        parts = []
        for start, end in zip(starts, [*starts[1:], tree.num_nodes], strict=True):
            tokens = tree.tokens[tree.node_offsets[start] : tree.node_offsets[end]]
            parents = [max(p - start, -1) for p in tree.parents[start:end].tolist()]
            parts.append(cls(tokens, tree.node_lengths[start:end].tolist(), parents, len(tokens)))
        return parts

    def padded(self, length: int) -> _Part:
        """With padding up to `length` as a child of the last node."""
        padding = length - len(self.tokens)
        if not padding:
            return self
        tokens = np.concatenate([self.tokens, np.full(padding, PADDING_TOKEN)])
        lengths, parents = [*self.lengths, padding], [*self.parents, len(self.parents) - 1]
        return _Part(tokens, lengths, parents, self.num_real)


def _assemble(items: Sequence[RowItem], parts: Sequence[_Part], targets: Targets) -> MicroBatch:
    """Join the parts of a row and move every item's targets to where its tokens stand."""
    is_real = np.concatenate([np.arange(len(p.tokens)) < p.num_real for p in parts])
    row_of = np.flatnonzero(is_real)  # k-th token of the data -> its row
    rows, tokens, responses, ids, pairs, margins, served = [], [], [], [], [], [], []
    own_tokens = []
    num_tokens = num_responses = 0
    for item in items:
        tree = item.view.tree
        source, target, response = targets(tree)
        rows.append(row_of[source + num_tokens])
        tokens.append(target)
        responses.append(response + num_responses)
        ids += [(item.group, int(r)) for r in item.view.responses]
        own_tokens += [
            tree.node_lengths[tree.response_nodes(r)].sum() for r in range(tree.num_responses)
        ]
        pairs.append(tree.pairs.astype(np.int64) + num_responses)
        margins.append(tree.pair_margins)
        served.append(responses_served(tree))
        num_tokens += tree.num_tokens
        num_responses += tree.num_responses
    source_row = _concatenate(rows, np.int64)
    order = np.argsort(source_row, kind="stable")
    served_T = np.zeros(len(is_real), np.int64)
    served_T[row_of] = _concatenate(served, np.int64)
    return MicroBatch(
        tokens=np.concatenate([p.tokens for p in parts]).astype(np.int64),
        layout=TreeLayout.concat([TreeLayout.from_parents(p.lengths, p.parents) for p in parts]),
        source_row=source_row[order],
        target_token=_concatenate(tokens, np.int64)[order],
        response=_concatenate(responses, np.int64)[order],
        response_ids=np.array(ids, np.int64).reshape(-1, 2),
        response_tokens=np.array(own_tokens, np.int64),
        pairs=_concatenate(pairs, np.int64).reshape(-1, 2),
        pair_weights=_concatenate([item.pair_weights for item in items], np.float64),
        pair_margins=_concatenate(margins, np.float64),
        num_tokens=num_tokens,
        served=served_T,
    )


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
