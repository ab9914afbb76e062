"""Collate: trees -> MicroBatch, the tokens, layout and targets of one row as integer arrays.

A row [p p | a a | b b b] with responses a and b of the prompt p has the targets

    logit_token   1  1  2  4  5      token 1 predicts the first token of both responses
    target_token  a0 b0 a1 b1 b2
    response      0  1  0  1  1

sorted by logit token. So tokens that predict nothing are never projected to logits, and token 1 is
projected once. A reward model scores the last token of each response instead: tokens 3 and 6, one
target per response. Shapes: T tokens, N targets, R responses, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from megatron_prefix.data.steps.row_images import RowImages, row_images
from megatron_prefix.data.steps.sharing import View
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.layout import TreeLayout

PADDING_TOKEN = 0
PADDING_TREE = 128
"""Most tokens of a tree of padding."""


class TreeTargets(NamedTuple):
    """Loss entries of one tree, int64 [N] each; tokens count from the tree's first."""

    logit_token: np.ndarray
    target_token: np.ndarray
    response: np.ndarray


Targets = Callable[[PrefixTree], TreeTargets]
"""`tree_targets` or `score_targets`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """One row, ready for the model.

    tokens int64 [T], padding included; `layout` covers them all; logit_token, target_token and
    response int64 [N] as above. response_ids int64 [R, 2] are (group, response in the group);
    response_tokens int64 [R] counts each response's own tokens; pairs int64 [P, 2] index this row's
    responses; pair_ids int64 [P, 2] are (group, pair among all of the group); pair_weights float64
    [P] are what each pair adds to the step's divisor; pair_margins and pair_betas float64 [P], NaN
    if the data has none. ranks int64 [R] and labels float64 [R] are the data's ranks (0 is best, -1
    unknown) and scores (NaN unknown); members int64 [S, K] are the responses of each comparison
    set, filled up with -1. `num_tokens` counts tokens without padding. served int64 [T] is how many
    of the row's responses each token is part of, 0 for padding; only routers of experts use it.
    desirable float64 [R] is 1 for a response labelled good, 0 for bad, NaN without a label; None if
    unknown.
    """

    tokens: np.ndarray
    layout: TreeLayout
    logit_token: np.ndarray
    target_token: np.ndarray
    response: np.ndarray
    response_ids: np.ndarray
    response_tokens: np.ndarray
    pairs: np.ndarray
    pair_ids: np.ndarray
    pair_weights: np.ndarray
    pair_margins: np.ndarray
    ranks: np.ndarray
    labels: np.ndarray
    members: np.ndarray
    num_tokens: int
    pair_betas: np.ndarray | None = None
    is_divided: bool = False
    """Whether pairs or sets of the row's step lie in several rows, so that it has no loss alone."""
    served: np.ndarray | None = None
    attributes: np.ndarray | None = None
    """Float64 [R, A]: the data's score for each attribute, NaN if unknown; None if no model
    learns them."""
    attribute_names: tuple[str, ...] = ()
    desirable: np.ndarray | None = None
    images: RowImages | None = None
    """None if the data set has none."""

    @property
    def num_responses(self) -> int:
        return len(self.response_ids)

    @property
    def num_projected(self) -> int:
        """Tokens whose logits are computed."""
        return len(np.unique(self.logit_token))


@dataclass(frozen=True, kw_only=True)
class RowItem:
    """One bundle of a row: its group, its tokens, and its pairs' weights in the loss."""

    group: int
    view: View
    pair_weights: np.ndarray
    pair_places: np.ndarray | None = None
    """The pairs' places in their group with all of its pairs, if some are left out."""
    desirable: np.ndarray | None = None
    """The labels of the view's responses, as in MicroBatch; None for none."""


def tree_targets(tree: PrefixTree) -> TreeTargets:
    """Targets of a language model: every own token of a response, predicted by the one before it.

    Within a node, token i is predicted by token i - 1; the first token of a node by the last token
    of its parent. Prompt [5 6] and responses [7 8] and [9], nodes at tokens 0, 2 and 4:

        response 0   logit tokens [1 2], targets [7 8]
        response 1   logit token  [1],   target  [9]
    """
    ends = tree.node_offsets[1:]
    logit_tokens, tokens, responses = [], [], []
    for response in range(tree.num_responses):
        for node in tree.response_nodes(response):
            start, end = tree.node_offsets[node], tree.node_offsets[node + 1]
            # Node [4, 6) whose parent ends with token 1: sources [3 4], then [1 4]. Token 3 is the
            # last of a sibling, so it must not predict token 4.
            source = np.arange(start - 1, end - 1)
            source[0] = ends[tree.parents[node]] - 1
            logit_tokens.append(source)
            tokens.append(tree.tokens[start:end])
            responses.append(np.full(end - start, response))
    parts = (logit_tokens, tokens, responses)
    return TreeTargets(*(np.concatenate(part).astype(np.int64) for part in parts))


def score_targets(tree: PrefixTree) -> TreeTargets:
    """Targets of a reward model: the last token of each response, once per response.

    No token is predicted; `target_token` is 0.
    """
    last = tree.node_offsets[1:][tree.response_last].astype(np.int64) - 1
    return TreeTargets(last, np.zeros_like(last), np.arange(tree.num_responses, dtype=np.int64))


TARGETS: dict[str, Targets] = {"lm": tree_targets, "reward": score_targets}
"""Targets for each kind of model."""


def responses_served(tree: PrefixTree) -> np.ndarray:
    """How many responses each token is part of, prompt or own, int64 [tokens].

    The counts of children add to their parent's: prompt [5 6] with responses [7 8] and [9] has
    [2 2 1 1 1].
    """
    # A response ends in each leaf, and may end in an inner node: prompt [5 6], responses [7] and
    # [7 8] have the nodes [5 6], [7], [8] with the counts [0 1 1], summed [2 2 1].
    counts = np.bincount(tree.response_last, minlength=tree.num_nodes)
    for node in range(tree.num_nodes - 1, -1, -1):  # children come after their parents
        if tree.parents[node] >= 0:
            counts[tree.parents[node]] += counts[node]
    return np.repeat(counts, tree.node_lengths)


def collate_packed(
    items: Sequence[RowItem], multiple: int = 1, targets: Targets = tree_targets
) -> MicroBatch:
    """One row of trees; padding without loss rounds its length up to `multiple`.

    Without items the row is empty: `multiple` tokens of padding. Padding is cut into short trees,
    so that attention over it costs little.
    """
    length = sum(item.view.tree.num_tokens for item in items)
    # To a multiple of 4: 5 tokens get 3 of padding, 8 get none, an empty row gets 4.
    padding = max(-(-length // multiple), 1) * multiple - length
    parts = [_Part.whole(item.view.tree) for item in items]
    if padding:
        # 300 tokens: trees of 128, 128 and 44
        lengths = [min(PADDING_TREE, padding - x) for x in range(0, padding, PADDING_TREE)]
        parts.append(_Part(np.full(padding, PADDING_TOKEN), lengths, [-1] * len(lengths)))
    return _assemble(items, parts, targets)


def collate_padded(
    items: Sequence[RowItem], multiple: int = 1, targets: Targets = tree_targets
) -> MicroBatch:
    """Sequences right-padded to the longest of them, one after another in a row.

    Padding continues its sequence, so attention over it costs the same as in a padded batch.
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
    """Consecutive nodes of a row. The first `num_real` tokens are data, the others padding."""

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
        """One part for every root of the tree, with its descendants."""
        # parents [-1 0 -1 2] -> the parts [-1 0] and [-1 0]
        starts = np.flatnonzero(tree.parents < 0).tolist()
        parts = []
        for start, end in zip(starts, [*starts[1:], tree.num_nodes], strict=True):
            tokens = tree.tokens[tree.node_offsets[start] : tree.node_offsets[end]]
            parents = [max(p - start, -1) for p in tree.parents[start:end].tolist()]
            parts.append(cls(tokens, tree.node_lengths[start:end].tolist(), parents, len(tokens)))
        return parts

    def padded(self, length: int) -> _Part:
        """This part with padding up to `length`, as a child of the last node."""
        padding = length - len(self.tokens)
        if not padding:
            return self
        tokens = np.concatenate([self.tokens, np.full(padding, PADDING_TOKEN)])
        lengths, parents = [*self.lengths, padding], [*self.parents, len(self.parents) - 1]
        return _Part(tokens, lengths, parents, self.num_real)


def _assemble(items: Sequence[RowItem], parts: Sequence[_Part], targets: Targets) -> MicroBatch:
    """Join the parts of a row, and move the targets of every item to the places of its tokens.

    Two sequences of 3 and 2 tokens, padded to 3: is_real [1 1 1 1 1 0], place [0 1 2 3 4]. Padded
    to 4: is_real [1 1 1 0 1 1 0 0], place [0 1 2 4 5]. A target at token 1 of the second sequence
    is at data token 3 + 1, so at token place[4] = 5 of the row.
    """
    is_real = np.concatenate([np.arange(len(p.tokens)) < p.num_real for p in parts])
    place = np.flatnonzero(is_real)  # token of the data -> token of the row
    logit_tokens, tokens, responses, pairs, margins, served = [], [], [], [], [], []
    ranks, labels, sets, betas, desirable = [], [], [], [], []
    ids: list[tuple[int, int]] = []
    pair_ids: list[tuple[int, int]] = []
    own_tokens: list[int] = []
    num_tokens = num_responses = 0
    for item in items:
        tree = item.view.tree
        entries = targets(tree)
        logit_tokens.append(place[entries.logit_token + num_tokens])
        tokens.append(entries.target_token)
        responses.append(entries.response + num_responses)
        ids += [(item.group, int(r)) for r in item.view.responses]
        own_tokens += [
            int(tree.node_lengths[tree.response_nodes(r)].sum()) for r in range(tree.num_responses)
        ]
        places = item.view.pairs if item.pair_places is None else item.pair_places
        pair_ids += [(item.group, int(p)) for p in places]
        pairs.append(tree.pairs.astype(np.int64) + num_responses)
        margins.append(tree.pair_margins)
        betas.append(tree.pair_betas)
        ranks.append(tree.ranks)
        labels.append(tree.scores)
        unknown = np.full(tree.num_responses, np.nan)
        desirable.append(unknown if item.desirable is None else item.desirable)
        sets += set_members(tree.response_sets, num_responses)
        served.append(responses_served(tree))
        num_tokens += tree.num_tokens
        num_responses += tree.num_responses
    logit_token = _concatenate(logit_tokens, np.int64)
    # Targets come response by response: logit tokens [1 2 | 1 4 5] of the example above. The head
    # needs them ascending: order [0 2 1 3 4], logit tokens [1 1 2 4 5].
    order = np.argsort(logit_token, kind="stable")
    served_T = np.zeros(len(is_real), np.int64)
    served_T[place] = _concatenate(served, np.int64)
    return MicroBatch(
        tokens=np.concatenate([p.tokens for p in parts]).astype(np.int64),
        layout=TreeLayout.concat([TreeLayout.from_parents(p.lengths, p.parents) for p in parts]),
        logit_token=logit_token[order],
        target_token=_concatenate(tokens, np.int64)[order],
        response=_concatenate(responses, np.int64)[order],
        response_ids=np.array(ids, np.int64).reshape(-1, 2),
        response_tokens=np.array(own_tokens, np.int64),
        pairs=_concatenate(pairs, np.int64).reshape(-1, 2),
        pair_ids=np.array(pair_ids, np.int64).reshape(-1, 2),
        pair_weights=_concatenate([item.pair_weights for item in items], np.float64),
        pair_margins=_concatenate(margins, np.float64),
        ranks=_concatenate(ranks, np.int64),
        labels=_concatenate(labels, np.float64),
        members=padded_members(sets),
        num_tokens=num_tokens,
        pair_betas=_concatenate(betas, np.float64),
        served=served_T,
        desirable=_concatenate(desirable, np.float64),
        images=row_images([item.view for item in items], place),
    )


def set_members(response_sets: np.ndarray, first: int = 0) -> list[np.ndarray]:
    """The responses of each comparison set of a group, numbered from `first`.

    Sets [0, 0, 1, 0] and first 5: [5, 6, 8], [7].
    """
    return [np.flatnonzero(response_sets == s) + first for s in np.unique(response_sets)]


def padded_members(sets: Sequence[np.ndarray]) -> np.ndarray:
    """Sets as one array [S, K] whose rows are filled up with -1; K is at least 1."""
    members = np.full((len(sets), max(map(len, sets), default=1)), -1, np.int64)
    for row, responses in zip(members, sets, strict=True):
        row[: len(responses)] = responses
    return members


def _concatenate(arrays: list[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
