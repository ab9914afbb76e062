"""From a layout to what the kernels read: built once a micro batch, shared by all layers.

The *leaf-path plan* cuts a row behind every leaf. Each piece is an ordinary variable-length
sequence: its queries are the rows this leaf is the first to cover (contiguous, in order), its
keys the leaf's whole root path, copied together by index. The last keys of a piece are its own
queries, so a causal mask aligned bottom-right is exactly the tree's visibility, and the work is
exactly the tree's area. An inner segment belongs to the piece of its first leaf:

    lengths [3, 2, 4], parents [-1, 0, 0]   (prompt, two responses)
    q_lengths   [5, 4]                      prompt + first response | second response
    kv_lengths  [5, 7]
    kv_index    [0 1 2 3 4 | 0 1 2 5 6 7 8] the prompt is copied once more

Backward needs the reverse: the sum over all copies of a token, in a fixed order. `copy_offsets`
and `copy_order` list them by token, as in a compressed sparse row matrix:

    copy_offsets [0, 2, 4, 6, 7, ...]       token 0 has the copies copy_order[0:2] = [0, 5]

Shapes: T tokens, T_kv gathered keys, G key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_prefix.layout import TreeLayout


@dataclass(frozen=True, eq=False)
class PathPlan:
    """One row cut into leaf paths; tensors live on the device the plan was built for."""

    kv_index: torch.Tensor
    """int64 [T_kv]: row of each gathered key."""
    cu_seqlens_q: torch.Tensor
    """int32 [pieces + 1]: where each piece's queries start, leading 0."""
    cu_seqlens_kv: torch.Tensor
    """int32 [pieces + 1]: where each piece's gathered keys start, leading 0."""
    max_seqlen_q: int
    """Most queries in a piece, in tokens; 0 in an empty row."""
    max_seqlen_kv: int
    """Longest root-to-leaf path, in tokens; 0 in an empty row."""
    q_lengths: list[int]
    """Queries of each piece, in tokens."""
    kv_lengths: list[int]
    """Keys of each piece, in tokens: at least its queries."""
    ancestor_starts: list[int]
    """Row where the keys in front of a piece's own start, where they are contiguous; else -1."""
    copy_order: torch.Tensor
    """int64 [T_kv]: the gathered keys sorted by the row they were copied from."""
    copy_offsets: torch.Tensor
    """int64 [T + 1]: row t has the copies `copy_order[copy_offsets[t] : copy_offsets[t + 1]]`."""
    gather_factor: float
    """T_kv / T; 1.0 where nothing is shared."""
    is_identity: bool
    """Whether every tree is a chain, so that the keys are used where they stand."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [T_kv, ...], every leaf's root path; no copy where it is the identity."""
        return rows if self.is_identity else rows.index_select(0, self.kv_index)

    def sum_copies(self, copies: torch.Tensor) -> torch.Tensor:
        """[T_kv, G, H] -> [T, G, H]: the transpose of `gather`.

        Sums in float32 at least and in the plan's order, never by atomic additions, so the
        result has the same bits every time; returned in the dtype of `copies`.
        """
        if self.is_identity:
            return copies
        exact = torch.promote_types(copies.dtype, torch.float32)
        ordered = copies.index_select(0, self.copy_order).to(exact).flatten(1)
        sums = torch.segment_reduce(
            ordered, "sum", offsets=self.copy_offsets, unsafe=True, initial=0.0
        )
        return sums.unflatten(1, copies.shape[1:]).to(copies.dtype)


class TreePlan:
    """A layout on a device, with each backend's data built when first asked for, and once."""

    def __init__(self, layout: TreeLayout, device: torch.device | str):
        self.layout = layout
        self.device = torch.device(device)

    @cached_property
    def path(self) -> PathPlan:
        """The leaf-path plan, for the backends `path` and `flash`."""
        return build_path_plan(self.layout, self.device)


def build_path_plan(layout: TreeLayout, device: torch.device | str) -> PathPlan:
    """Cut `layout` behind every leaf; see the module's example."""
    leaves = np.flatnonzero(layout.leaf_mask)
    leaf_ends = (layout.starts + layout.lengths)[leaves].astype(np.int64)
    q_lengths = np.diff(leaf_ends, prepend=0)
    kv_lengths = (layout.first_positions + layout.lengths)[leaves].astype(np.int64)
    kv_index = _root_path_rows(layout, leaves)
    assert len(kv_index) == kv_lengths.sum(), "root paths disagree with positions"

    num_tokens = layout.num_tokens
    copies = np.bincount(kv_index, minlength=num_tokens)
    return PathPlan(
        kv_index=torch.from_numpy(kv_index).to(device),
        cu_seqlens_q=_cumulative(q_lengths, torch.int32, device),
        cu_seqlens_kv=_cumulative(kv_lengths, torch.int32, device),
        max_seqlen_q=int(q_lengths.max(initial=0)),
        max_seqlen_kv=int(kv_lengths.max(initial=0)),
        q_lengths=q_lengths.tolist(),
        kv_lengths=kv_lengths.tolist(),
        ancestor_starts=_ancestor_starts(kv_index, q_lengths, kv_lengths),
        copy_order=torch.from_numpy(np.argsort(kv_index, kind="stable")).to(device),
        copy_offsets=_cumulative(copies, torch.int64, device),
        gather_factor=len(kv_index) / num_tokens if num_tokens else 1.0,
        is_identity=len(kv_index) == num_tokens,
    )


def _root_path_rows(layout: TreeLayout, leaves: np.ndarray) -> np.ndarray:
    """Rows on the root path of each leaf, root first, leaf after leaf; one step a tree level."""
    piece = np.arange(len(leaves))
    segment = leaves
    pieces, segments = [], []
    while len(segment):
        pieces.append(piece)
        segments.append(segment)
        parent = layout.parents[segment]
        piece, segment = piece[parent >= 0], parent[parent >= 0]
    if not pieces:
        return np.zeros(0, dtype=np.int64)
    segments = np.concatenate(segments)
    segments = segments[np.lexsort((segments, np.concatenate(pieces)))]
    lengths = layout.lengths[segments].astype(np.int64)
    shift = layout.starts[segments] - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(shift, lengths)


def _ancestor_starts(kv_index: np.ndarray, q_lengths: np.ndarray, kv_lengths: np.ndarray) -> list:
    """First row of each piece's ancestor keys where these are contiguous, else -1."""
    if not len(kv_index):
        return []
    num_ancestors = kv_lengths - q_lengths
    begins = np.cumsum(kv_lengths) - kv_lengths
    first = kv_index[begins]
    last = kv_index[begins + np.maximum(num_ancestors, 1) - 1]
    return np.where(last - first == np.maximum(num_ancestors, 1) - 1, first, -1).tolist()


def _cumulative(lengths: np.ndarray, dtype: torch.dtype, device) -> torch.Tensor:
    """Lengths [3, 2, 4] -> offsets [0, 3, 5, 9]."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return torch.from_numpy(offsets).to(device=device, dtype=dtype)
