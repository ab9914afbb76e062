"""Parts of groups: the nodes that some responses need, and new numbers for what remains.

Shapes: G groups, M nodes, P pairs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_prefix.data.store.blocks import Block, starts

OWN, MISMATCH = 0, 1
"""Values of `response_roles`: a response of the group's own records, or one of another prompt."""
ROLES = "response_roles"


def own_block(block: Block) -> Block:
    """A block without mismatches and without the nodes that only they need."""
    columns = dict(block.columns)
    nodes, responses = columns["group_nodes"], columns["group_responses"]
    is_own, groups = columns[ROLES] == OWN, np.arange(block.num_groups)
    kept = counts(is_own, responses)
    needed = needed_nodes(columns["node_parents"], nodes, columns["response_last"][is_own], kept)
    new_nodes = local_numbers(needed, nodes)
    columns["pair_responses"] = renumbered_pairs(
        columns["pair_responses"],
        columns["group_pairs"],
        local_numbers(is_own, responses),
        responses,
    )
    for name in columns:
        if name.startswith("response_"):
            columns[name] = columns[name][is_own]
    owner = np.repeat(groups, kept)
    for name in ("response_first", "response_last"):
        columns[name] = renumbered(columns[name], owner, new_nodes, nodes)
    is_kept = np.repeat(needed, block.node_lengths)
    owner = np.repeat(groups, counts(needed, nodes))
    columns["node_parents"] = renumbered(columns["node_parents"][needed], owner, new_nodes, nodes)
    columns["group_nodes"], columns["group_responses"] = counts(needed, nodes), kept
    return replace(
        block,
        tokens=block.tokens[is_kept],
        node_lengths=block.node_lengths[needed],
        columns=columns,
        images=None if block.images is None else block.images.within(is_kept),
    )


def needed_nodes(
    parents_M: np.ndarray, nodes_G: np.ndarray, lasts: np.ndarray, lasts_G: np.ndarray
) -> np.ndarray:
    """The nodes on the paths to some nodes, bool [M]. `lasts` count within their group, of which
    each has `lasts_G`.

    A group with the parents [-1 0 0 1] and the last nodes [2]: needed [1 0 1 0].
    """
    first_nodes = starts(nodes_G)
    needed = np.zeros(len(parents_M), bool)
    rising = np.repeat(first_nodes, lasts_G) + lasts
    above = np.where(parents_M < 0, -1, np.repeat(first_nodes, nodes_G) + parents_M)
    while len(rising):
        needed[rising] = True
        rising = above[rising]
        rising = np.unique(rising[rising >= 0])
        rising = rising[~needed[rising]]
    return needed


def counts(is_kept: np.ndarray, sizes_G: np.ndarray) -> np.ndarray:
    """How many entries of each group are kept, int64 [G]."""
    ends = np.cumsum(np.concatenate([[0], is_kept]))
    firsts = starts(sizes_G)
    return (ends[firsts + sizes_G] - ends[firsts]).astype(np.int64)


def offsets(counts_G: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts_G)]).astype(np.int64)


def local_numbers(is_kept: np.ndarray, sizes_G: np.ndarray) -> np.ndarray:
    """The new number within its group of each kept entry, int64; meaningless for the others.

    Groups of 3 and 2 entries, kept [1 0 1 | 0 1]: [0 . 1 | . 0].
    """
    kept_before = np.cumsum(is_kept) - is_kept
    firsts = np.minimum(starts(sizes_G), len(is_kept) - 1)
    return kept_before - np.repeat(kept_before[firsts], sizes_G)


def renumbered(
    values: np.ndarray, owner: np.ndarray, numbers: np.ndarray, sizes_G: np.ndarray
) -> np.ndarray:
    """`values`, which count within the group `owner` of each, by their new `numbers`; -1 stays."""
    new = numbers[np.maximum(starts(sizes_G)[owner] + values, 0)]
    return np.where(values < 0, -1, new).astype(np.int32)


def renumbered_pairs(
    pairs_P2: np.ndarray, pairs_G: np.ndarray, numbers: np.ndarray, responses_G: np.ndarray
) -> np.ndarray:
    """Both sides of pairs by the new `numbers` of responses."""
    owner = np.repeat(np.arange(len(pairs_G)), pairs_G)
    sides = [renumbered(side, owner, numbers, responses_G) for side in pairs_P2.T]
    return np.stack(sides, axis=1)
