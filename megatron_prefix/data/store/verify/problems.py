"""Problems of the groups of a span, found by whole columns.

Each check yields (group of the span, the problem), at most one per kind. Shape suffixes: G groups,
M nodes, R responses, P pairs of the span.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_prefix.data.store.blocks import starts
from megatron_prefix.data.store.columns import column
from megatron_prefix.data.store.verify.spans import Span

Problem = tuple[int, str]


def column_problems(span: Span) -> Iterator[Problem]:
    """Problems of all columns; a check relies on the checks before it."""
    yield from _pointing_problems(span)
    yield from shape_problems(span)
    yield from _response_problems(span)
    yield from _pair_problems(span)
    yield from _value_problems(span)


def _value_problems(span: Span) -> Iterator[Problem]:
    """Entries that break the rule of their column, where each can be judged alone."""
    groups = {
        "node": span.group_of_node,
        "response": span.group_of_response,
        "pair": span.group_of_pair,
    }
    for name, values in span.block.columns.items():
        about, kind = column(name), name.split("_")[0]
        if about.holds is not None:
            text = f"{name} of {kind} {{n}} is not as it must be: {about.rule}"
            yield from _first(~about.holds(values), groups[kind], text)


def _first(bad: np.ndarray, groups: np.ndarray, text: str) -> Iterator[Problem]:
    """The first entry that is `bad`, and its group; {n} is its number within the group."""
    # groups [0 0 1 1 1], entry 3 is bad: group 1 begins at entry 2, so it is its number 1.
    for at in np.flatnonzero(bad)[:1]:
        group = groups[at]
        yield int(group), text.format(n=at - np.searchsorted(groups, group))


def _pointing_problems(span: Span) -> Iterator[Problem]:
    for name, group, limit in (
        ("response_first", span.group_of_response, "group_nodes"),
        ("response_last", span.group_of_response, "group_nodes"),
        ("pair_responses", span.group_of_pair, "group_responses"),
    ):
        values = span[name].reshape(len(group), 2 if name == "pair_responses" else 1)
        bad = (values < 0) | (values >= span[limit][group][:, None])
        yield from _first(bad.any(axis=1), group, f"{name} points outside the group")


def shape_problems(span: Span) -> Iterator[Problem]:
    """Nodes that are not in depth-first pre-order.

    They are in pre-order if depth grows by at most 1 from each node to the next, and if the
    parent of a node is the last node before it that is one level higher:

        depths  [1  2 3 3 2]
        parents [-1 0 1 1 0]

    That last node is found for all nodes at once: sort keys of (depth, node), and look up (depth
    - 1, node). With base = M + 1 = 6 the keys, depth * 6 + node, are [6 13 20 21 16], sorted
    [6 13 16 20 21]. Node 3 has depth 3 and looks up 2 * 6 + 3 = 15: the key before it is 13,
    which is depth 2, node 1.
    """
    group, parents = span.group_of_node, span.parents
    node, local = np.arange(len(group)), span["node_parents"]
    yield from _first(local < -1, group, "node {n} has a parent below -1")
    late = "node {n} does not follow its parent"
    yield from _first(parents >= node, group, late)
    depths = span.depths
    base = len(node) + 1
    keys = np.sort(depths * base + node)
    before = np.searchsorted(keys, (depths - 1) * base + node) - 1
    nearest = np.where(depths > 1, keys[before] - (depths - 1) * base, -1)
    leaps = np.diff(depths, prepend=0) > 1
    yield from _first((nearest != parents) | leaps, group, late)


def token_problems(span: Span) -> Iterator[Problem]:
    """Tokens that are stored twice: children of one parent (or roots of one group) that begin
    with the same token.

    Roots get a parent of their own for each group, M + group. Sorted by (parent, first token),
    equal siblings are neighbours.
    """
    # One group, parents [-1 0 0], first tokens [5 7 7]: parent_or_root [3 0 0], order [1 2 0].
    # Nodes 1 and 2 are neighbours with the same parent and the same first token.
    group, parents, local = span.group_of_node, span.parents, span["node_parents"]
    first_token = span.block.tokens[starts(span.lengths)].astype(np.int64)
    parent_or_root = np.where(parents < 0, len(parents) + group, parents)
    order = np.lexsort((first_token, parent_or_root))
    twice = (np.diff(parent_or_root[order]) == 0) & (np.diff(first_token[order]) == 0)
    for at in np.flatnonzero(twice)[:1]:
        parent = int(local[order[at]])
        text = f"two children of node {parent} begin with the same token"
        yield int(group[order[at]]), text


def _response_problems(span: Span) -> Iterator[Problem]:
    group, lengths = span.group_of_response, span.lengths
    first, last = span.own_nodes("first"), span.own_nodes("last")
    # All responses climb at once from their last node, each until it is no longer after `first`.
    # It is then at `first`, unless `first` is not on its path.
    node = last.copy()
    while (climbing := node > first).any():
        node[climbing] = span.parents[node[climbing]]
    yield from _first(node != first, group, "response {n} begins off its own path")
    prompts = span.ends[first] - lengths[first]
    for name, values in (("lengths", span.ends[last]), ("prompts", prompts)):
        bad = span[f"response_{name}"] != values
        yield from _first(bad, group, f"response_{name} differ from the paths at {{n}}")
    yield from _first(prompts < 1, group, "response {n} has no prompt token")


def _pair_problems(span: Span) -> Iterator[Problem]:
    group = span.group_of_pair
    first_response = starts(span["group_responses"])[group]
    chosen, rejected = span["pair_responses"].T + first_response
    yield from _first(chosen == rejected, group, "pair {n} compares a response with itself")
    sets = span["response_sets"]
    apart = sets[chosen] != sets[rejected]
    yield from _first(apart, group, "pair {n} takes its responses from two comparison sets")
