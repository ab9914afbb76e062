"""Problems of the groups of a span, found by whole columns.

Each check yields (group of the span, the problem), at most one per kind. All of them together take
about as long as the columns take to read. Shape suffixes: G groups, M nodes, R responses, P pairs
of the span.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_prefix.data.store.blocks import starts
from megatron_prefix.data.store.columns import column
from megatron_prefix.data.store.pruning import MISMATCH, ROLES
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
    for name, values in span.block.columns.items():
        about, kind = column(name), name.split("_")[0]
        if about.holds is None:
            continue
        holds = about.holds(values)
        if not holds.all():
            text = f"{name} of {kind} {{n}} is not as it must be: {about.rule}"
            yield from _first(~holds, getattr(span, f"group_of_{kind}"), text)


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
        # As unsigned numbers, those below 0 are the largest: [-1 0 2] -> [4294967295 0 2].
        most = span[limit].astype(np.uint32)[group]
        bad = values.view(np.uint32) >= most[:, None]
        if bad.any():
            yield from _first(bad.any(axis=1), group, f"{name} points outside the group")


def shape_problems(span: Span) -> Iterator[Problem]:
    """Nodes that are not in depth-first pre-order.

    They are in pre-order if the parent of each node is the node before it, or one above that:

        parents [-1 0 1 1 0]     node 4: before it 3, above that 1, above that 0, its parent

    All nodes climb at once from the node before them, until they meet their parent, or have gone
    past it. Together they climb at most M times, because a node that was left is not met again.
    """
    group, parents, local = span.group_of_node, span.parents, span["node_parents"]
    if local.min(initial=0) < -1:
        yield from _first(local < -1, group, "node {n} has a parent below -1")
    late = "node {n} does not follow its parent"
    node = np.arange(len(group))
    after = parents >= node
    if after.any():
        yield from _first(after, group, late)
    node = np.flatnonzero(parents >= 0)
    target, above = parents[node], node - 1
    while len(node):
        past = above < target
        if past.any():
            is_late = np.zeros(len(group), bool)
            is_late[node[past]] = True
            yield from _first(is_late, group, late)
            return
        left = np.flatnonzero(above != target)
        node, target, above = node[left], target[left], parents[above[left]]


def token_problems(span: Span) -> Iterator[Problem]:
    """Tokens that are stored twice: children of one parent (or roots of one group) that begin
    with the same token; different images are different tokens.

    Roots get a parent of their own for each group, M + group. Sorted by (parent, first token),
    equal siblings are neighbours.
    """
    # One group, parents [-1 0 0], first tokens [5 7 7]: parent_or_root [3 0 0], order [1 2 0].
    # Nodes 1 and 2 are neighbours with the same parent and the same first token.
    group, parents, local = span.group_of_node, span.parents, span["node_parents"]
    first_token = span.block.bare_tokens[starts(span.lengths)].astype(np.int64)
    parent_or_root = np.where(parents < 0, len(parents) + group, parents)
    order = np.lexsort((first_token, parent_or_root))
    twice = (np.diff(parent_or_root[order]) == 0) & (np.diff(first_token[order]) == 0)
    for at in np.flatnonzero(twice)[:1]:
        parent = int(local[order[at]])
        text = f"two children of node {parent} begin with the same token"
        yield int(group[order[at]]), text


def _response_problems(span: Span) -> Iterator[Problem]:
    group = span.group_of_response
    first, last = span.own_nodes("first"), span.own_nodes("last")
    # All responses climb at once from their last node, each until it is no longer after `first`.
    # It is then at `first`, unless `first` is not on its path.
    number, node, top = np.arange(len(last)), last, first
    while True:
        past = node < top
        if past.any():
            is_off = np.zeros(len(last), bool)
            is_off[number[past]] = True
            yield from _first(is_off, group, "response {n} begins off its own path")
            return
        left = np.flatnonzero(node > top)
        if not len(left):
            break
        number, node, top = number[left], span.parents[node[left]], top[left]
    prompts = span.ends[first] - span.lengths[first]
    for name, values in (("lengths", span.ends[last]), ("prompts", prompts)):
        bad = span[f"response_{name}"] != values
        if bad.any():
            yield from _first(bad, group, f"response_{name} differ from the paths at {{n}}")
    if prompts.min(initial=1) < 1:
        yield from _first(prompts < 1, group, "response {n} has no prompt token")


def _pair_problems(span: Span) -> Iterator[Problem]:
    group = span.group_of_pair
    chosen, rejected = span["pair_responses"].T
    same = chosen == rejected
    if same.any():
        yield from _first(same, group, "pair {n} compares a response with itself")
    first_response, sets = starts(span["group_responses"])[group], span["response_sets"]
    if ROLES in span.block.columns:
        is_mismatch = span[ROLES] == MISMATCH
        bad = is_mismatch[chosen + first_response] | is_mismatch[rejected + first_response]
        yield from _first(bad, group, "pair {n} has a mismatch, which has no label")
    apart = sets[chosen + first_response] != sets[rejected + first_response]
    if apart.any():
        text = "pair {n} takes its responses from two comparison sets"
        yield from _first(apart, group, text)
