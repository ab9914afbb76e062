"""Sharing modes: the tokens that are run for one group.

A **bundle** is the smallest part of a group that holds both sides of its pairs. It must fit one
row. A group with responses a, b, c of one prompt p and pairs (a, b), (a, c):

    tree      one bundle   p -> a, b, c                  every token once
    pair      two bundles  p -> a, b       p -> a, c     the prompt once per pair
    response  one bundle   p a | p b | p c               each response with its own prompt
    none      two bundles  p a | p b       p a | p c     one sequence per pair and side

Every bundle is a PrefixTree (`|` separates its roots), so rows, layout and loss handle trees only.
With `data.oversized: split` a bundle that does not fit is several, each with some of its responses
(parts.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_prefix.data.rebuilding import bare, with_images
from megatron_prefix.data.steps.parts import Limits, Part, cut_sequences, cut_tree
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tree import PrefixTree

SHARING_MODES = ("tree", "pair", "response", "none")
NO_LIMITS = Limits()


@dataclass(frozen=True)
class Bundle:
    """Part `item` of a group: the index of a pair, or of a comparison set, or 0 for the tree.

    `slot` is the group's place in its step: a step that crosses the end of an epoch can have a
    group twice.
    """

    group: int
    item: int
    num_tokens: int
    slot: int = 0
    part: Part | None = None
    """The responses of it that are run, if it is cut; None: all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """The tokens of a bundle as they are run.

    `responses[i]` is the group's index of the tree's response i; the same for `pairs`.
    """

    tree: PrefixTree
    responses: np.ndarray
    pairs: np.ndarray
    is_shared: bool = True
    """Whether responses share tokens, and so images; else each root of the tree has its own."""


def bundles_of(
    dataset: PreferenceDataset, group: int, sharing: str, limits: Limits = NO_LIMITS
) -> list[Bundle]:
    """The bundles of a group with their lengths in tokens, from the data set's columns alone; those
    beyond `limits` in parts."""
    bundles = _whole_bundles(dataset, group, sharing)
    if limits == NO_LIMITS:
        return bundles
    return [cut for bundle in bundles for cut in _cut(dataset, bundle, sharing, limits)]


def _whole_bundles(dataset: PreferenceDataset, group: int, sharing: str) -> list[Bundle]:
    if sharing == "tree":
        return [Bundle(group, 0, dataset.group_num_tokens(group))]
    r0, r1 = (int(x) for x in dataset.group_responses[group : group + 2])
    lengths = dataset.response_lengths[r0:r1].astype(np.int64)
    if sharing == "response":
        sets = dataset.response_sets[r0:r1]
        return [Bundle(group, int(s), int(lengths[sets == s].sum())) for s in np.unique(sets)]
    p0, p1 = (int(x) for x in dataset.group_pairs[group : group + 2])
    # Sides of 5 and 4 tokens with a prompt of 3: 9 tokens, and 6 under `pair`. If the loss of one
    # side starts later, only the shorter prompt is shared.
    sides = dataset.pair_responses[p0:p1]
    tokens = lengths[sides].sum(axis=1)
    if sharing == "pair":
        tokens = tokens - dataset.response_prompts[r0:r1].astype(np.int64)[sides].min(axis=1)
    return [Bundle(group, i, int(n)) for i, n in enumerate(tokens)]


def bundle_parts(
    dataset: PreferenceDataset, bundle: Bundle, sharing: str
) -> tuple[np.ndarray, np.ndarray]:
    """The responses and the pairs of a bundle, as indices within its group and in the order of its
    `view`, from the data set's columns alone. A part has the pairs whose sides are both in it."""
    if bundle.part is not None:
        responses = np.array(bundle.part.responses, np.int64)
        _, pairs = bundle_parts(dataset, replace(bundle, part=None), sharing)
        own = dataset.pair_responses[int(dataset.group_pairs[bundle.group]) + pairs]
        return responses, pairs[np.isin(own, responses).all(axis=1)]
    r0, r1 = (int(x) for x in dataset.group_responses[bundle.group : bundle.group + 2])
    p0, p1 = (int(x) for x in dataset.group_pairs[bundle.group : bundle.group + 2])
    if sharing == "tree":
        return np.arange(r1 - r0), np.arange(p1 - p0)
    sides = np.asarray(dataset.pair_responses[p0:p1], np.int64)
    if sharing == "response":
        sets = np.asarray(dataset.response_sets[r0:r1])
        is_own = sets == bundle.item
        return np.flatnonzero(is_own), np.flatnonzero(is_own[sides[:, 0]])
    return sides[bundle.item], np.array([bundle.item])


def _cut(dataset: PreferenceDataset, bundle: Bundle, sharing: str, limits: Limits) -> list[Bundle]:
    """A bundle, or its parts if it is beyond the limits."""
    sequences = 0 if limits.sequences is None else num_sequences(dataset, bundle, sharing)
    if limits.allow(bundle.num_tokens, sequences):
        return [bundle]
    m0, m1 = (int(x) for x in dataset.group_nodes[bundle.group : bundle.group + 2])
    r0, r1 = (int(x) for x in dataset.group_responses[bundle.group : bundle.group + 2])
    if sharing == "tree":
        assert limits.tokens is not None, "a tree is one sequence"
        lengths, parents = dataset.node_lengths[m0:m1].tolist(), dataset.node_parents[m0:m1]
        lasts = dataset.response_last[r0:r1].tolist()
        parts = cut_tree(lengths, parents.tolist(), lasts, limits.tokens)
    else:
        responses, _ = bundle_parts(dataset, bundle, sharing)
        paths = np.asarray(dataset.response_lengths[r0:r1], np.int64)[responses].tolist()
        parts = cut_sequences(responses.tolist(), paths, limits)
        if sharing == "pair":  # [prompt | chosen] and [prompt | rejected]
            prompt = int(dataset.response_prompts[r0:r1][responses].min())
            parts = [parts[0], *(replace(part, repeated=prompt) for part in parts[1:])]
    if len(parts) == 1:
        return [bundle]
    return [replace(bundle, num_tokens=part.num_tokens, part=part) for part in parts]


def num_sequences(dataset: PreferenceDataset, bundle: Bundle, sharing: str) -> int:
    """The sequences of a bundle without packing."""
    if sharing in ("tree", "pair"):
        return 1
    return len(bundle_parts(dataset, bundle, sharing)[0])


def all_bundles(dataset: PreferenceDataset, sharing: str) -> tuple[np.ndarray, ...]:
    """(group, item, num_tokens) of every bundle of the data set, [B] each, groups in order.

    Pairs and responses are numbered within their group in the columns: adding the group's first
    response gives indices into whole columns. Comparison sets get the key group * most + set, so
    with most = 2 sets [0, 1] of group 0 and [0] of group 1 are the keys [0, 1, 2].
    """
    num_groups = len(dataset)
    if sharing == "tree":
        zeros = np.zeros(num_groups, np.int64)
        return np.arange(num_groups), zeros, dataset.groups_num_tokens()
    lengths = np.asarray(dataset.response_lengths, np.int64)
    firsts = np.asarray(dataset.group_responses)
    if sharing == "response":
        group = np.repeat(np.arange(num_groups), np.diff(firsts))
        sets = np.asarray(dataset.response_sets, np.int64)
        most = int(sets.max()) + 1
        keys, inverse = np.unique(group * most + sets, return_inverse=True)
        tokens = np.bincount(inverse, lengths, len(keys))
        return keys // most, keys % most, tokens.astype(np.int64)
    pair_offsets = np.asarray(dataset.group_pairs)
    group = np.repeat(np.arange(num_groups), np.diff(pair_offsets))
    sides = np.asarray(dataset.pair_responses, np.int64) + firsts[group][:, None]
    tokens = lengths[sides].sum(axis=1)
    if sharing == "pair":
        tokens -= np.asarray(dataset.response_prompts, np.int64)[sides].min(axis=1)
    return group, np.arange(len(group)) - pair_offsets[group], tokens


def all_parts(
    dataset: PreferenceDataset, sharing: str, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(group, num_tokens, repeated) of every bundle of the data set, [B] each, in the order of
    `all_bundles`; those over `capacity` tokens in parts."""
    group, item, tokens = all_bundles(dataset, sharing)
    limits = Limits(tokens=capacity)
    parts = {
        index: _cut(
            dataset,
            Bundle(int(group[index]), int(item[index]), int(tokens[index])),
            sharing,
            limits,
        )
        for index in np.flatnonzero(tokens > capacity).tolist()
    }
    # Bundles of 5, 20 and 7 tokens, the second in parts of 9, 9 and 8: counts [1 3 1], index
    # [0 1 1 1 2], tokens [5 9 9 8 7].
    counts = np.ones(len(tokens), np.int64)
    counts[list(parts)] = [len(cut) for cut in parts.values()]
    starts = np.cumsum(counts) - counts
    group, tokens = np.repeat(group, counts), np.repeat(tokens, counts)
    repeated = np.zeros(len(tokens), np.int64)
    for index, cut in parts.items():
        place = slice(int(starts[index]), int(starts[index]) + len(cut))
        tokens[place] = [bundle.num_tokens for bundle in cut]
        repeated[place] = [bundle.part.repeated if bundle.part else 0 for bundle in cut]
    return group, tokens, repeated


def group_lengths(dataset: PreferenceDataset, sharing: str) -> np.ndarray:
    """Tokens of each group under a sharing mode, int64 [groups]."""
    group, _, tokens = all_bundles(dataset, sharing)
    return np.bincount(group, tokens, len(dataset)).astype(np.int64)


def group_firsts(group: np.ndarray, num_groups: int) -> np.ndarray:
    """Where the bundles of each group begin, [groups + 1], by the group of every bundle.

    Groups [0 0 1 2 2] of bundles: [0 2 3 5].
    """
    return np.concatenate([[0], np.cumsum(np.bincount(group, minlength=num_groups))])


def view(tree: PrefixTree, sharing: str, item: int, part: Part | None = None) -> View:
    """The tokens of one bundle of `tree`, or of a part of it, as they are run under `sharing`."""
    own = _view(bare(tree), sharing, item, part)
    is_shared = sharing == "tree" or (sharing == "pair" and part is None)
    return replace(own, tree=with_images(own.tree, [tree]), is_shared=is_shared)


def _view(tree: PrefixTree, sharing: str, item: int, part: Part | None) -> View:
    if part is not None:
        return _part_view(tree, sharing, np.array(part.responses, np.int64))
    everything = np.arange(tree.num_responses), np.arange(tree.num_pairs)
    if sharing == "tree":
        return View(tree=tree, responses=everything[0], pairs=everything[1])
    if sharing == "response":
        responses = np.flatnonzero(tree.response_sets == item)
        pairs = np.flatnonzero(tree.pair_sets == item)
    else:
        responses, pairs = tree.pairs[item].astype(np.int64), np.array([item])
    build = _share_prompt if sharing == "pair" else _chains
    return View(tree=build(tree, responses, pairs), responses=responses, pairs=pairs)


def _part_view(tree: PrefixTree, sharing: str, responses: np.ndarray) -> View:
    """These responses alone, with those pairs whose sides are both among them."""
    if sharing == "tree":
        pairs = np.flatnonzero(np.isin(tree.pairs, responses).all(axis=1))
        own = tree.restrict(responses.tolist())
    else:
        # the part of a pair is one side; that of a set may have pairs
        is_of_set = sharing == "response"
        inside = np.isin(tree.pairs, responses).all(axis=1) & is_of_set
        pairs = np.flatnonzero(inside)
        own = _chains(tree, responses, pairs)
    return View(tree=own, responses=responses, pairs=pairs)


def alone(tree: PrefixTree, response: int) -> View:
    """One response of `tree` by itself, without its pairs."""
    own, nothing = np.array([response]), np.zeros(0, np.int64)
    chain = with_images(_chains(bare(tree), own, nothing), [tree])
    return View(tree=chain, responses=own, pairs=nothing)


def _chains(tree: PrefixTree, responses: np.ndarray, pairs: np.ndarray) -> PrefixTree:
    """Each response alone: a root with its prompt and a child with its own tokens."""
    nodes: list[np.ndarray] = []
    for response in responses:
        tokens, loss_start = tree.response_tokens(int(response))
        nodes += [tokens[:loss_start], tokens[loss_start:]]
    # Three responses: first [1 3 5], parents [-1 0 -1 2 -1 4]
    first = 2 * np.arange(len(responses)) + 1
    parents = np.full(len(nodes), -1)
    parents[first] = first - 1
    return _assemble(tree, responses, pairs, nodes, parents, first)


def _share_prompt(tree: PrefixTree, responses: np.ndarray, pairs: np.ndarray) -> PrefixTree:
    """`[prompt | chosen | rejected]`: the prompt ends at the earlier start of the two losses.

    If the loss of the other side starts later, the tokens between are a node without loss. With
    losses that start at tokens 3 and 5 of paths of 6 tokens:

        nodes    [0:3]  [3:6] of one side  [3:5] of the other  [5:6] of the other
        parents  -1     0                  0                   2
    """
    paths = [tree.response_tokens(int(r)) for r in responses]
    common = min(loss_start for _, loss_start in paths)
    nodes, parents, first = [paths[0][0][:common]], [-1], []
    for tokens, loss_start in paths:
        assert np.array_equal(tokens[:common], nodes[0]), "a pair's sides have different prompts"
        parent = 0
        if loss_start > common:
            nodes.append(tokens[common:loss_start])
            parents.append(0)
            parent = len(nodes) - 1
        nodes.append(tokens[loss_start:])
        parents.append(parent)
        first.append(len(nodes) - 1)
    return _assemble(tree, responses, pairs, nodes, np.array(parents), np.array(first))


def _assemble(
    tree: PrefixTree,
    responses: np.ndarray,
    pairs: np.ndarray,
    nodes: list[np.ndarray],
    parents: np.ndarray,
    ends: np.ndarray,
) -> PrefixTree:
    """A tree of `nodes` in which the own tokens of response i are the one node `ends[i]`."""
    # Responses 0 and 2 of three: local [0 -1 1], so the pair (0, 2) becomes (0, 1)
    local = np.full(tree.num_responses, -1)
    local[responses] = np.arange(len(responses))
    return PrefixTree(
        tokens=np.concatenate(nodes),
        node_offsets=np.cumsum([0] + [len(n) for n in nodes], dtype=np.int64),
        parents=parents.astype(np.int32),
        response_first=ends.astype(np.int32),
        response_last=ends.astype(np.int32),
        response_sets=tree.response_sets[responses],
        ranks=tree.ranks[responses],
        scores=tree.scores[responses],
        pairs=local[tree.pairs[pairs]].astype(np.int32).reshape(-1, 2),
        pair_weights=tree.pair_weights[pairs],
        pair_margins=tree.pair_margins[pairs],
        pair_betas=tree.pair_betas[pairs],
    )
