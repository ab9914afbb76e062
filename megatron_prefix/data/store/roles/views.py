"""Roles of responses: a group's own ones, and its mismatch, which another record answers with.

`build --kto` puts a response of another prompt after each group's prompt. It has the role 1 in the
column `response_roles`, no label, no pair, and a comparison set of its own. Only objectives that
measure how far the policy is from its reference on such responses read them. Everything else sees
the data set without them:

    group   responses 0, 1 and the mismatch 2; nodes [prompt], [0], [1], [2]
    own     responses 0, 1                     nodes [prompt], [0], [1]
    mismatched   response 0 of one             nodes [prompt], [2]

Both are views: columns in memory, tokens in the files. Shapes: G groups, M nodes, R responses.
"""

from __future__ import annotations

import copy

import numpy as np

from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.columns import COLUMNS, OPTIONAL_COLUMNS
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.joined import join_datasets
from megatron_prefix.data.store.pruning import (
    MISMATCH,
    OWN,
    ROLES,
    counts,
    local_numbers,
    needed_nodes,
    offsets,
    own_block,
    renumbered,
    renumbered_pairs,
)


def own_responses(dataset: PreferenceDataset) -> PreferenceDataset:
    """The data set without mismatches; itself if it has none."""
    return _view(dataset, OWN) if has_mismatches(dataset) else dataset


def mismatched_responses(dataset: PreferenceDataset) -> PreferenceDataset | None:
    """The data set with its mismatches only, at most one response per group; None without any.

    `dataset` may be what `own_responses` returned.
    """
    stored = dataset.stored
    return _view(stored, MISMATCH) if has_mismatches(stored) else None


def has_mismatches(dataset: PreferenceDataset) -> bool:
    return ROLES in dataset.columns and bool((np.asarray(dataset.response_roles) == MISMATCH).any())


def without_mismatches(block: Block) -> Block:
    """The block without mismatches and what only they need; itself if it has none."""
    return own_block(block) if ROLES in block.columns else block


def _view(dataset: PreferenceDataset, role: int) -> PreferenceDataset:
    if len(dataset.parts) > 1:
        parts = [_view(part, role) for part in dataset.parts]
        view = join_datasets(parts)
        firsts = np.cumsum([0, *(len(part.response_lengths) for part in dataset.parts[:-1])])
        numbers = [part.response_numbers for part in parts]
        view.response_numbers = np.concatenate(
            [own + first for own, first in zip(numbers, firsts, strict=True) if own is not None]
        )
        view.source = dataset
        return view
    view = copy.copy(dataset)
    vars(view).pop("desirable", None)  # computed of all responses
    is_kept = np.asarray(dataset.response_roles) == role
    responses, nodes, pairs = (
        np.diff(np.asarray(getattr(dataset, f"group_{kind}"), np.int64))
        for kind in ("responses", "nodes", "pairs")
    )
    needed = needed_nodes(
        np.asarray(dataset.node_parents),
        nodes,
        np.asarray(dataset.response_last)[is_kept],
        counts(is_kept, responses),
    )
    view.source, view.response_numbers = dataset, np.flatnonzero(is_kept)
    for name in (*COLUMNS, *OPTIONAL_COLUMNS):
        if name.startswith("response_"):
            setattr(view, name, np.asarray(getattr(dataset, name))[is_kept])
    view.group_responses = offsets(counts(is_kept, responses))
    view.group_nodes = offsets(counts(needed, nodes))
    view.node_lengths = np.asarray(dataset.node_lengths)[needed]
    groups, new_nodes = np.arange(len(nodes)), local_numbers(needed, nodes)
    owner = np.repeat(groups, counts(needed, nodes))
    view.node_parents = renumbered(
        np.asarray(dataset.node_parents)[needed], owner, new_nodes, nodes
    )
    owner = np.repeat(groups, counts(is_kept, responses))
    for name in ("response_first", "response_last"):
        setattr(view, name, renumbered(getattr(view, name), owner, new_nodes, nodes))
    if role == OWN:
        new_responses = local_numbers(is_kept, responses)
        view.pair_responses = renumbered_pairs(
            np.asarray(dataset.pair_responses), pairs, new_responses, responses
        )
    else:
        view.group_pairs = np.zeros(len(nodes) + 1, np.int64)
        for name in (*COLUMNS, *OPTIONAL_COLUMNS):
            if name.startswith("pair_"):
                setattr(view, name, np.asarray(getattr(dataset, name))[:0])
    return view
