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

A plan may cover some rows only, as context parallelism asks for: `q_rows` of the row are queries,
and keys are held for `kv_rows`. Pieces are then also cut where queries have gaps:

    q_rows [3, 4, 6, 7]                     first response | rows 6 and 7 of the second
    q_lengths   [2, 2]
    kv_lengths  [5, 6]                      row 7 has the root path 0 1 2 5 6 7

Shapes: L queries, S keys, S_kv gathered keys (S = L = T, the row's tokens, in a whole plan);
G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_prefix.layout import TreeLayout
from megatron_prefix.platform.transfer import on_device

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PathPlan:
    """One row cut into leaf paths; tensors live on the device the plan was built for."""

    kv_index: torch.Tensor
    """int64 [S_kv]: where each gathered key stands among the keys."""
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
    own_starts: list[int]
    """Where among the keys a piece's own rows start, those that are its queries too."""
    ancestor_starts: list[int]
    """Where the keys in front of a piece's own start, where they are contiguous; else -1."""
    copy_order: torch.Tensor
    """int64 [S_kv]: the gathered keys sorted by the key they were copied from."""
    copy_offsets: torch.Tensor
    """int64 [S + 1]: key s has the copies `copy_order[copy_offsets[s] : copy_offsets[s + 1]]`."""
    gather_factor: float
    """S_kv / S; 1.0 where nothing is shared."""
    is_identity: bool
    """Whether every tree is a chain, so that the keys are used where they stand."""

    def gather(self, keys: torch.Tensor) -> torch.Tensor:
        """[S, ...] -> [S_kv, ...], every piece's root path; no copy where it is the identity."""
        return keys if self.is_identity else keys.index_select(0, self.kv_index)

    def sum_copies(self, copies: torch.Tensor) -> torch.Tensor:
        """[S_kv, G, H] -> [S, G, H]: the transpose of `gather`.

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
    """A layout on a device, with each backend's data built when first asked for, and once.

    `prepare` of api.py asks ahead of the first layer.

    `q_rows` and `kv_rows` are ascending row indices, the whole row where not given: queries are
    rows `q_rows`, keys and values rows `kv_rows`, which hold the root path of every query.
    """

    def __init__(
        self,
        layout: TreeLayout,
        device: torch.device | str,
        q_rows: np.ndarray | None = None,
        kv_rows: np.ndarray | None = None,
    ):
        self.layout = layout
        self.device = torch.device(device)
        self.q_rows = q_rows
        self.kv_rows = kv_rows
        self._built: dict[str, Any] = {}

    @property
    def num_queries(self) -> int:
        return self.layout.num_tokens if self.q_rows is None else len(self.q_rows)

    @property
    def num_keys(self) -> int:
        return self.layout.num_tokens if self.kv_rows is None else len(self.kv_rows)

    @cached_property
    def path(self) -> PathPlan:
        """The leaf-path plan, for the backends `path`, `flash` and `te`."""
        return build_path_plan(self.layout, self.device, self.q_rows, self.kv_rows)

    def once(self, name: str, build: Callable[[TreePlan], T]) -> T:
        """What `build` makes of this plan, made at the first call with this `name` and kept."""
        if name not in self._built:
            self._built[name] = build(self)
        return self._built[name]


def build_path_plan(
    layout: TreeLayout,
    device: torch.device | str,
    q_rows: np.ndarray | None = None,
    kv_rows: np.ndarray | None = None,
) -> PathPlan:
    """Cut `layout` behind every leaf, and where `q_rows` have gaps; see the module's example."""
    q_lengths, last_rows = _pieces(layout, q_rows)
    kv_index, kv_lengths = _root_paths(layout, last_rows)
    num_keys = layout.num_tokens
    if kv_rows is not None:
        num_keys = len(kv_rows)
        kv_index, rows = np.searchsorted(kv_rows, kv_index), kv_index
        assert (np.take(kv_rows, kv_index, mode="clip") == rows).all(), "a query's path is missing"

    copies = np.bincount(kv_index, minlength=num_keys)
    ends = np.cumsum(kv_lengths)
    return PathPlan(
        kv_index=on_device(kv_index, device),
        cu_seqlens_q=on_device(_cumulative(q_lengths, np.int32), device),
        cu_seqlens_kv=on_device(_cumulative(kv_lengths, np.int32), device),
        max_seqlen_q=int(q_lengths.max(initial=0)),
        max_seqlen_kv=int(kv_lengths.max(initial=0)),
        q_lengths=q_lengths.tolist(),
        kv_lengths=kv_lengths.tolist(),
        own_starts=kv_index[ends - q_lengths].tolist(),
        ancestor_starts=_ancestor_starts(kv_index, q_lengths, kv_lengths),
        copy_order=on_device(np.argsort(kv_index, kind="stable"), device),
        copy_offsets=on_device(_cumulative(copies, np.int64), device),
        gather_factor=len(kv_index) / num_keys if num_keys else 1.0,
        is_identity=np.array_equal(kv_index, np.arange(num_keys)),
    )


def _pieces(layout: TreeLayout, q_rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Queries of each piece, and its last row, int64 [pieces] each."""
    leaf_ends = (layout.starts + layout.lengths)[layout.leaf_mask].astype(np.int64)
    if q_rows is None:
        return np.diff(leaf_ends, prepend=0), leaf_ends - 1
    leaf_of = np.searchsorted(leaf_ends, q_rows, side="right")
    is_last = (np.diff(q_rows, append=-2) != 1) | (np.diff(leaf_of, append=-1) != 0)
    lasts = np.flatnonzero(is_last)
    return np.diff(lasts, prepend=-1), np.asarray(q_rows, np.int64)[lasts]


def _root_paths(layout: TreeLayout, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The root path of each row, itself included: rows from root to row, path after path, and
    the paths' lengths; one step a tree level."""
    segment = np.searchsorted(layout.starts, rows, side="right") - 1
    length = rows - layout.starts[segment] + 1
    piece = np.arange(len(rows))
    pieces, segments, lengths = [], [], []
    while len(segment):
        pieces.append(piece)
        segments.append(segment)
        lengths.append(length)
        parent = layout.parents[segment]
        piece, segment = piece[parent >= 0], parent[parent >= 0]
        length = layout.lengths[segment].astype(np.int64)
    if not pieces:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    pieces, segments, lengths = (np.concatenate(x) for x in (pieces, segments, lengths))
    order = np.lexsort((segments, pieces))
    segments, lengths = segments[order], lengths[order]
    shift = layout.starts[segments] - (np.cumsum(lengths) - lengths)
    index = np.arange(lengths.sum(), dtype=np.int64) + np.repeat(shift, lengths)
    return index, np.bincount(pieces[order], lengths, len(rows)).astype(np.int64)


def _ancestor_starts(kv_index: np.ndarray, q_lengths: np.ndarray, kv_lengths: np.ndarray) -> list:
    """Where each piece's ancestor keys start if they are contiguous, else -1."""
    if not len(kv_index):
        return []
    num_ancestors = kv_lengths - q_lengths
    begins = np.cumsum(kv_lengths) - kv_lengths
    first = kv_index[begins]
    last = kv_index[begins + np.maximum(num_ancestors, 1) - 1]
    return np.where(last - first == np.maximum(num_ancestors, 1) - 1, first, -1).tolist()


def _cumulative(lengths: np.ndarray, dtype: type[np.integer]) -> np.ndarray:
    """Lengths [3, 2, 4] -> offsets [0, 3, 5, 9]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(dtype)
