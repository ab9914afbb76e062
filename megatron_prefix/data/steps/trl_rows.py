"""One tree row under the names that TRL uses, for losses written for Hugging Face models.

TRL 1.16 packs the samples of its AsyncGRPO trainer as a tree
(`trl.experimental.async_grpo.packing.TreeRow`). `tree_rows` gives the same row for any token lists.
In this layout every token has one next token: two responses fork one token before they differ, so
the token before the fork is stored once per branch. So one label per position is enough.

    prompt [5, 6]; responses [7, 8] and [9]      token lists [5, 6, 7, 8] and [5, 6, 9]

    segment 0  [5]         parent -1     next token 6
    segment 1  [6, 7, 8]   parent  0     next tokens 7, 8, none
    segment 2  [6, 9]      parent  0     next tokens 9, none

    input_ids         5  6  7  8  6  9
    position_ids      0  1  2  3  1  2
    shift_labels    -100  7  8 -100  9 -100
    tree_cu_seqlens_q  [0, 1, 4, 6]      one entry per segment
    tree_kv_index      [0 | 0 1 2 3 | 0 4 5], tree_cu_seqlens_k [0, 1, 5, 8]: their root paths
    token_index        [1, 2, 4], segment_id [0, 0, 1]: positions that predict a trained token

Shapes: T tokens, S segments, K gathered keys, N trained tokens of all responses, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_prefix.data.tree import share_prefixes
from megatron_prefix.layout import TreeLayout

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position that predicts no trained token."""
TOKEN_BITS = 31


def tree_rows(
    token_lists: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]],
    *,
    completion_masks: Sequence[Sequence[int]],
) -> dict[str, torch.Tensor]:
    """Collate responses, each given with its prompt, into one row of trees.

    `completion_masks` has a 1 for each token with loss, like TRL's `completion_mask`: where a
    prompt ends cannot be told from tokens, because responses may begin the same. `pairs` are
    (chosen, rejected) indices of `token_lists`. Any common beginning is shared, also between
    prompts.

    CPU tensors with TRL's names, dtypes and shapes: `input_ids`, `position_ids`, `shift_labels`
    int64 [T]; `tree_kv_index` int64 [K]; `tree_cu_seqlens_q`, `tree_cu_seqlens_k` int32 [S + 1];
    `tree_max_seqlens` int64 [2], the longest segment and the longest path; `token_index`,
    `segment_id` int64 [N], sorted by response, then token. Our own: `tree_parents` int32 [S] and
    `pairs` int64 [P, 2]. `log_probs[token_index]`, summed by `segment_id`, are the responses'.
    `TreeLayout.from_parents(tree_cu_seqlens_q.diff(), tree_parents)` is the row's layout.

    The first token of a response's list is predicted by nothing, so its mask has no effect, as in
    TRL. Raises ValueError, with the response or pair, if the arguments do not fit together.
    """
    import torch

    paths, masks, pairs_P2 = _checked(token_lists, pairs, completion_masks)
    nodes, parents, last_nodes = share_prefixes([_with_next(path) for path in paths])
    layout = TreeLayout.from_parents([len(node) for node in nodes], parents)
    ends = layout.starts + layout.lengths.astype(np.int64)
    kv_index, kv_lengths = layout.root_paths(ends - 1)

    # Where each response's tokens are in the row, one response after another. The position before
    # a trained token predicts it: path [0 1 2 3] with mask [0 0 1 1] has the sources [1 2].
    places, lengths = layout.root_paths(ends[last_nodes] - 1)
    mask = np.concatenate(masks)
    mask[np.cumsum(lengths) - lengths] = False  # first tokens
    trained = np.flatnonzero(mask)
    token_index = places[trained - 1]
    labels = np.full(layout.num_tokens, IGNORED, np.int64)
    labels[token_index] = np.concatenate(paths)[trained]

    row = {
        "input_ids": np.concatenate(nodes) >> TOKEN_BITS,
        "position_ids": layout.position_ids(),
        "shift_labels": labels,
        "tree_kv_index": kv_index,
        "tree_cu_seqlens_q": np.append(0, ends).astype(np.int32),
        "tree_cu_seqlens_k": np.append(0, np.cumsum(kv_lengths)).astype(np.int32),
        "tree_max_seqlens": np.array([layout.lengths.max(), kv_lengths.max()], np.int64),
        "token_index": token_index,
        "segment_id": np.repeat(np.arange(len(paths)), lengths)[trained],
        "tree_parents": layout.parents.copy(),
        "pairs": pairs_P2,
    }
    return {name: torch.from_numpy(array) for name, array in row.items()}


def _with_next(path: np.ndarray) -> np.ndarray:
    """Each token and the one after it as one number; the last token has none, which is 0.

    So no path is the beginning of another, and equal numbers have equal labels.
    """
    # [7 8 2] -> [7 * 2^31 + 9, 8 * 2^31 + 3, 2 * 2^31]
    after = np.append(path[1:] + 1, 0)
    return path << TOKEN_BITS | after


def _checked(
    token_lists: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]],
    completion_masks: Sequence[Sequence[int]],
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """The arguments as arrays: paths int64, masks bool, pairs int64 [P, 2]."""
    if not len(token_lists) or len(token_lists) != len(completion_masks):
        raise ValueError(
            f"{len(token_lists)} token lists and {len(completion_masks)} completion masks: give "
            "one mask per token list, and at least one token list"
        )
    paths = [np.asarray(tokens, np.int64) for tokens in token_lists]
    masks = [np.asarray(mask, bool) for mask in completion_masks]
    for i, (path, mask) in enumerate(zip(paths, masks, strict=True)):
        if path.ndim != 1 or not len(path) or path.shape != mask.shape:
            raise ValueError(
                f"token list {i} has shape {path.shape} and its completion mask {mask.shape}: both "
                "need one entry per token, and at least one token"
            )
        if path.min() < 0 or path.max() + 1 >= 2**TOKEN_BITS:
            raise ValueError(
                f"token list {i} has tokens from {path.min()} to {path.max()}: a token is at least "
                f"0 and below {2**TOKEN_BITS - 1}; remove padding"
            )
    pairs_P2 = np.array(pairs, np.int64).reshape(-1, 2)
    for chosen, rejected in pairs_P2.tolist():
        if chosen == rejected or min(chosen, rejected) < 0 or max(chosen, rejected) >= len(paths):
            raise ValueError(
                f"pair ({chosen}, {rejected}) needs two different indices of the {len(paths)} "
                "token lists"
            )
    return paths, masks, pairs_P2
