"""Token paths of one group -> a PrefixTree, which stores every shared token once.

The responses of a group are token paths that begin with the same tokens. `build_tree` merges
them. A node ends at the last token that its paths share, before the first token that a response
is trained on, and at the end of a response:

    prompt [5, 6]; responses [7, 8, 2], [7, 9, 2], [7]       (the loss starts at depth 2)

    node 0  [5, 6]      parent -1   the prompt
    node 1  [7]         parent  0   response 2 ends here; the others go on
    node 2  [8, 2]      parent  1   response 0 ends here
    node 3  [9, 2]      parent  1   response 1 ends here
    response_first = [1, 1, 1]      response_last = [2, 3, 1]

Nodes are in depth-first pre-order, children in order of first appearance. So a node's
descendants follow it directly. Shape suffixes: T tokens, M nodes, R responses, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megatron_prefix.data.tree_images import TreeImages

UNRANKED = -1
"""Rank of a response whose rank is unknown."""
MAX_WEIGHT = 1e100
"""Of a pair, so that sums of weights stay finite."""


@dataclass(frozen=True, kw_only=True)
class ResponsePath:
    """One response as tokens: `tokens[:loss_start]` is its prompt, the loss is on the rest.

    `set_id` numbers the comparison set inside the group: the siblings that it is compared with.
    `rank` is 0 for the best and -1 if unknown; `score` is NaN if unknown.
    """

    tokens: np.ndarray
    loss_start: int
    set_id: int = 0
    rank: int = UNRANKED
    score: float = float("nan")
    attributes: tuple[float, ...] = ()
    """A score for each attribute that the data set has; NaN if unknown."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A labelled comparison; `chosen` and `rejected` are indices into the group's responses."""

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float = float("nan")
    beta: float = float("nan")
    """The pair's own `loss.beta`; NaN for that of the run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixTree:
    """One group: its tokens, shared ones stored once, its responses and its pairs.

    Shapes: tokens_T; node_offsets_M1 (leading 0); parents_M (-1 at a root; there may be several
    roots); response_first_R and response_last_R are the first and the last node of a response's
    own tokens; pairs_P2 holds (chosen, rejected) response indices.
    """

    tokens: np.ndarray
    node_offsets: np.ndarray
    parents: np.ndarray
    response_first: np.ndarray
    response_last: np.ndarray
    response_sets: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    pairs: np.ndarray
    pair_weights: np.ndarray
    pair_margins: np.ndarray
    pair_betas: np.ndarray
    images: TreeImages | None = None
    """None if the data set has none."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def num_responses(self) -> int:
        return len(self.response_last)

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)

    @property
    def node_lengths(self) -> np.ndarray:
        return np.diff(self.node_offsets)

    @property
    def pair_sets(self) -> np.ndarray:
        """The comparison set of each pair, [P]."""
        return self.response_sets[self.pairs[:, 0]] if self.num_pairs else np.zeros(0, np.int32)

    def path(self, node: int) -> list[int]:
        """The nodes from the root down to `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def response_nodes(self, response: int) -> list[int]:
        """The nodes of the response's own tokens, in order."""
        path = self.path(int(self.response_last[response]))
        return path[path.index(int(self.response_first[response])) :]

    def node_tokens(self, node: int) -> np.ndarray:
        return self.tokens[self.node_offsets[node] : self.node_offsets[node + 1]]

    def response_tokens(self, response: int) -> tuple[np.ndarray, int]:
        """The tokens of the whole path, and the index of the response's first own token."""
        path = self.path(int(self.response_last[response]))
        prompt = path[: path.index(int(self.response_first[response]))]
        lengths = self.node_lengths
        tokens = np.concatenate([self.node_tokens(node) for node in path])
        return tokens, int(lengths[prompt].sum()) if prompt else 0

    def restrict(self, responses: Sequence[int]) -> PrefixTree:
        """The same group with only these responses, their pairs and the nodes they need."""
        needed = set()
        for response in responses:
            needed.update(self.path(int(self.response_last[response])))
        nodes = np.array(sorted(needed), np.int64)
        # Parents [-1, 0, 0] and nodes [0, 2]: new_node = [0, -1, 1, -1]. Its last entry, which
        # index -1 reads, keeps the root's parent at -1, so new_node[parents[[0, 2]]] = [-1, 0].
        new_node = np.full(self.num_nodes + 1, -1, np.int64)
        new_node[nodes] = np.arange(len(nodes))
        new_response = {old: new for new, old in enumerate(responses)}
        pairs = [
            p for p, (c, r) in enumerate(self.pairs) if c in new_response and r in new_response
        ]
        selected = np.asarray(responses, np.int64)
        lengths = self.node_lengths[nodes]
        is_kept = np.repeat(np.isin(np.arange(self.num_nodes), nodes), self.node_lengths)
        return PrefixTree(
            tokens=np.concatenate([self.node_tokens(n) for n in nodes]),
            node_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            parents=new_node[self.parents[nodes]].astype(np.int32),
            response_first=new_node[self.response_first[selected]].astype(np.int32),
            response_last=new_node[self.response_last[selected]].astype(np.int32),
            response_sets=self.response_sets[selected],
            ranks=self.ranks[selected],
            scores=self.scores[selected],
            pairs=np.array(
                [[new_response[int(r)] for r in self.pairs[p]] for p in pairs], np.int32
            ).reshape(-1, 2),
            pair_weights=self.pair_weights[pairs],
            pair_margins=self.pair_margins[pairs],
            pair_betas=self.pair_betas[pairs],
            images=None if self.images is None else self.images.within(is_kept),
        )


# How three paths become one tree: [5, 6, 7, 8] and [5, 6, 9], both with loss_start 1, and
# [5, 6] (also loss_start 1). The root is empty; its children are the roots of the PrefixTree.
#
#   insert [5, 6, 7, 8]      [5, 6, 7, 8]
#   insert [5, 6, 9]         [5, 6] - [7, 8]            split after the tokens that both share
#                                   - [9]
#   insert [5, 6]            nothing new: the tree already has this path
#   cut at depths 1 and 2    [5] - [6] - [7, 8]         each loss begins a node, each path ends one
#                                      - [9]
#   flatten                  nodes [5], [6], [7, 8], [9]; parents [-1, 0, 1, 1]
#   first and last nodes     (1, 2), (1, 3), (1, 1)
@dataclass
class _Node:
    """A node of a tree that is being built."""

    tokens: np.ndarray
    children: list[_Node] = field(default_factory=list)

    def split(self, at: int) -> None:
        """Keep the first `at` tokens and give the rest to a new only child."""
        self.children = [_Node(self.tokens[at:], self.children)]
        self.tokens = self.tokens[:at]


def common_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two paths share."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n


def _insert(root: _Node, tokens: np.ndarray) -> None:
    """Add a path below `root`."""
    node, at = root, 0
    # Invariant: the path down to the end of `node` is tokens[:at].
    while at < len(tokens):
        rest = tokens[at:]
        child = next((c for c in node.children if c.tokens[0] == rest[0]), None)
        if child is None:
            node.children.append(_Node(rest))
            return
        common = common_tokens(child.tokens, rest)
        if common < len(child.tokens):
            child.split(common)
        node, at = child, at + common


def _cut(root: _Node, tokens: np.ndarray, depth: int) -> None:
    """Let a node end at `depth` on the path of `tokens`."""
    node, at = root, 0
    while at < depth:
        node = next(c for c in node.children if c.tokens[0] == tokens[at])
        if at + len(node.tokens) > depth:
            node.split(depth - at)
        at += len(node.tokens)


def _ends(
    root: _Node, index: dict[int, int], tokens: np.ndarray, loss_start: int
) -> tuple[int, int]:
    """Indices of the first and the last node of `tokens[loss_start:]`."""
    node, at, first = root, 0, -1
    while at < len(tokens):
        node = next(c for c in node.children if c.tokens[0] == tokens[at])
        if at == loss_start:
            first = index[id(node)]
        at += len(node.tokens)
    return first, index[id(node)]


def _flatten(root: _Node) -> tuple[list[_Node], list[int]]:
    """Nodes in depth-first pre-order, and the indices of their parents."""
    nodes: list[_Node] = []
    parents: list[int] = []
    # The last entry of the stack is next, so the first child is pushed last.
    stack = [(child, -1) for child in reversed(root.children)]
    while stack:
        node, parent = stack.pop()
        stack += [(child, len(nodes)) for child in reversed(node.children)]
        nodes.append(node)
        parents.append(parent)
    return nodes, parents


def share_prefixes(
    paths: Sequence[np.ndarray],
) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Merge paths by their first tokens alone: the tokens of each node in depth-first pre-order,
    the nodes' parents (-1 at a root), and the last node of each path.

    A node ends only at a branch or at a leaf, so no path may be the beginning of a longer one.

        [5, 6, 7], [5, 8]  ->  nodes [5], [6, 7], [8]; parents [-1, 0, 0]; last nodes [1, 2]
    """
    root = _Node(np.zeros(0, np.int64))
    for path in paths:
        _insert(root, path)
    nodes, parents = _flatten(root)
    index = {id(node): i for i, node in enumerate(nodes)}
    lasts = [_ends(root, index, path, 0)[1] for path in paths]
    return [node.tokens for node in nodes], parents, lasts


class MergedPaths(NamedTuple):
    """The paths of a group as one tree, before they become arrays.

    `nodes` are the tokens of each node in depth-first pre-order, `parents` the parents (-1 at a
    root), `ends` the first and the last node of every response.
    """

    nodes: list[np.ndarray]
    parents: list[int]
    ends: list[tuple[int, int]]
    responses: Sequence[ResponsePath]
    pairs: Sequence[Pair]


def _merged(responses: Sequence[ResponsePath], pairs: Sequence[Pair]) -> MergedPaths:
    root = _Node(np.zeros(0, np.int64))  # its children are the roots of the tree
    for r in responses:
        _insert(root, r.tokens)
    for r in responses:
        _cut(root, r.tokens, r.loss_start)
        _cut(root, r.tokens, len(r.tokens))
    # Only now, when no node is split any more, do nodes get their numbers.
    nodes, parents = _flatten(root)
    index = {id(node): i for i, node in enumerate(nodes)}
    ends = [_ends(root, index, r.tokens, r.loss_start) for r in responses]
    return MergedPaths([node.tokens for node in nodes], parents, ends, responses, pairs)


def _two_answers(responses: Sequence[ResponsePath], pairs: Sequence[Pair]) -> MergedPaths | None:
    """A shortcut for the most common group: two answers to one prompt, neither a prefix of the
    other.

        prompt [5]; answers [6, 7] and [6, 8]  ->  nodes [5], [6], [7], [8]

    Returns None for every other group: those go to `_merged`.
    """
    if len(responses) != 2 or responses[0].loss_start != responses[1].loss_start:
        return None
    # The paths must differ in their responses, and before one of them ends. Then the tree is the
    # prompt, the part that both responses share (it may be empty), and two leaves.
    a, b, start = responses[0].tokens, responses[1].tokens, responses[0].loss_start
    common = common_tokens(a, b)
    if not start <= common < min(len(a), len(b)):
        return None
    if common == start:
        nodes, parents, ends = [a[:start], a[start:], b[start:]], [-1, 0, 0], [(1, 1), (2, 2)]
    else:
        nodes = [a[:start], a[start:common], a[common:], b[common:]]
        parents, ends = [-1, 0, 1, 1], [(1, 2), (1, 3)]
    return MergedPaths(nodes, parents, ends, responses, pairs)


def merge_paths(responses: Sequence[ResponsePath], pairs: Sequence[Pair]) -> MergedPaths:
    """Merge token paths into one tree.

    Raises ValueError if a path has no prompt token or no response token, or if the two sides of a
    pair are not different responses of one comparison set.
    """
    for i, r in enumerate(responses):
        if not 0 < r.loss_start < len(r.tokens):
            raise ValueError(
                f"response {i} has {len(r.tokens)} tokens and its loss starts at token "
                f"{r.loss_start}: it needs at least one prompt token and one response token"
            )
    for p in pairs:
        if not (0 <= p.chosen < len(responses) and 0 <= p.rejected < len(responses)):
            raise ValueError(f"{p} names a response outside 0..{len(responses) - 1}")
        if p.chosen == p.rejected or responses[p.chosen].set_id != responses[p.rejected].set_id:
            raise ValueError(f"{p}: the sides must be two different responses of one set")
    return _two_answers(responses, pairs) or _merged(responses, pairs)


def build_tree(responses: Sequence[ResponsePath], pairs: Sequence[Pair]) -> PrefixTree:
    """Merge token paths into one PrefixTree. Raises ValueError like `merge_paths`."""
    arrays: dict[str, Any] = dict(joined([merge_paths(responses, pairs)]))
    return PrefixTree(**arrays)


def joined(groups: Sequence[MergedPaths]) -> dict[str, np.ndarray]:
    """The arrays of a PrefixTree for all groups, concatenated.

    Nodes and responses keep their numbers within their group; only `node_offsets` count through:
    two groups with nodes of 2, 1 and of 3 tokens have the offsets [0, 2, 3, 6].
    """
    nodes = [tokens for group in groups for tokens in group.nodes]
    ends = np.array([end for group in groups for end in group.ends], np.int32).reshape(-1, 2)
    responses = [response for group in groups for response in group.responses]
    pairs = [pair for group in groups for pair in group.pairs]
    sides = np.array([(pair.chosen, pair.rejected) for pair in pairs], np.int32)
    return {
        "tokens": np.concatenate(nodes),
        "node_offsets": np.cumsum([0, *map(len, nodes)], dtype=np.int64),
        "parents": np.array([parent for group in groups for parent in group.parents], np.int32),
        "response_first": ends[:, 0].copy(),
        "response_last": ends[:, 1].copy(),
        "response_sets": np.array([r.set_id for r in responses], np.int32),
        "ranks": np.array([r.rank for r in responses], np.int32),
        "scores": np.array([r.score for r in responses], np.float64),
        "pairs": sides.reshape(-1, 2),
        "pair_weights": np.array([pair.weight for pair in pairs], np.float64),
        "pair_margins": np.array([pair.margin for pair in pairs], np.float64),
        "pair_betas": np.array([pair.beta for pair in pairs], np.float64),
    }
