"""Attention plans: the arrays that kernels read, built once per micro batch for all layers.

The *leaf-path plan* cuts a row after every leaf. Each piece is an ordinary variable-length
sequence: its queries are the tokens on this leaf's path that no earlier leaf's path contains
(contiguous, in order), its keys are the leaf's whole root path, gathered by index. The last keys of
a piece are its own queries. So a causal mask aligned bottom-right is exactly the tree's visibility,
and the work is exactly the tree's area. An inner segment belongs to the piece of its first leaf:

    lengths [3, 2, 4], parents [-1, 0, 0]   (prompt, two responses)
    q_lengths   [5, 4]                      prompt + first response | second response
    kv_lengths  [5, 7]
    kv_index    [0 1 2 3 4 | 0 1 2 5 6 7 8] the prompt is copied a second time

Backward needs the reverse: the sum over all copies of a token, in a fixed order. `copy_offsets`
and `copy_order` list the copies by token, like a compressed sparse row matrix:

    copy_offsets [0, 2, 4, 6, 7, ...]       token 0 has the copies copy_order[0:2] = [0, 5]

With context parallelism a plan covers only some tokens of the row: `q_tokens` are queries, and
keys are held for `kv_tokens`. Pieces are then also cut at gaps between queries:

    q_tokens [3, 4, 6, 7]                   first response | tokens 6 and 7 of the second
    q_lengths   [2, 2]
    kv_lengths  [5, 6]                      token 7 has the root path 0 1 2 5 6 7

With a sliding window a piece has no keys before the first one that its first query sees, and the
kernel applies the same window to its bottom-right mask. Window 2, the whole row:

    kv_lengths  [5, 5]                      token 5 sees 2 and 5, so token 2 is copied, 0 and 1 not

Shapes: L queries, S keys, S_kv gathered keys (S = L = T, the row's tokens, in a plan of the whole
row); G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_prefix.attention.pieces import cut_into_pieces, seen_paths
from megatron_prefix.layout import TreeLayout
from megatron_prefix.platform import on_device

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PathPlan:
    """One row cut into leaf paths. Tensors are on the device for which the plan was built."""

    kv_index: torch.Tensor
    """int64 [S_kv]: the index of each gathered key among the keys."""
    cu_seqlens_q: torch.Tensor
    """int32 [pieces + 1]: the start of each piece's queries, leading 0."""
    cu_seqlens_kv: torch.Tensor
    """int32 [pieces + 1]: the start of each piece's gathered keys, leading 0."""
    max_seqlen_q: int
    """Most queries in a piece, in tokens; 0 in an empty row."""
    max_seqlen_kv: int
    """Longest root-to-leaf path, in tokens; 0 in an empty row."""
    q_lengths: list[int]
    """Number of queries of each piece."""
    kv_lengths: list[int]
    """Number of keys of each piece: at least as many as its queries."""
    own_starts: list[int]
    """Index among the keys of each piece's first own key. Own keys belong to its queries."""
    ancestor_starts: list[int]
    """Index of the first key before a piece's own keys if those keys are contiguous, else -1."""
    copy_order: torch.Tensor
    """int64 [S_kv]: the gathered keys, sorted by the key of which they are copies."""
    copy_offsets: torch.Tensor
    """int64 [S + 1]: key s has the copies `copy_order[copy_offsets[s] : copy_offsets[s + 1]]`."""
    gather_factor: float
    """S_kv / S; 1.0 if nothing is shared."""
    is_identity: bool
    """Whether every tree is a chain, so that no key needs to be gathered."""
    window: int | None = None
    """Keys that a query sees, itself included, at the most; None: all keys of its piece."""

    def gather(self, keys: torch.Tensor) -> torch.Tensor:
        """[S, ...] -> [S_kv, ...], every piece's root path; `keys` itself if every tree is a
        chain."""
        return keys if self.is_identity else keys.index_select(0, self.kv_index)

    def sum_copies(self, copies: torch.Tensor, is_fused: bool = False) -> torch.Tensor:
        """[S_kv, G, H] -> [S, G, H]: the transpose of `gather`.

        Sums in float32 or better and in the plan's order, without atomic additions. So the result
        has the same bits every time. Returned in the dtype of `copies`. With `is_fused` a Triton
        kernel does it in one launch.
        """
        if self.is_identity:
            return copies
        if is_fused:
            from megatron_prefix.kernels import segment_sums  # needs Triton

            return segment_sums(copies, self.copy_order, self.copy_offsets)
        exact = torch.promote_types(copies.dtype, torch.float32)
        ordered = copies.index_select(0, self.copy_order).to(exact).flatten(1)
        sums = torch.segment_reduce(
            ordered, "sum", offsets=self.copy_offsets, unsafe=True, initial=0.0
        )
        return sums.unflatten(1, copies.shape[1:]).to(copies.dtype)


class TreePlan:
    """A layout on a device. What a backend reads of it is built at the first use, once.

    `q_tokens` and `kv_tokens` are ascending token indices, by default all tokens of the row:
    `q_tokens` are the queries; `kv_tokens` are the keys and values, and hold the root path of
    every query, or as much of it as the window shows. A query sees the last `window` tokens of its
    root path, itself included; None is all of them.
    """

    def __init__(
        self,
        layout: TreeLayout,
        device: torch.device | str,
        q_tokens: np.ndarray | None = None,
        kv_tokens: np.ndarray | None = None,
        window: int | None = None,
    ):
        self.layout = layout
        self.device = torch.device(device)
        self.q_tokens = q_tokens
        self.kv_tokens = kv_tokens
        self.window = window
        self._built: dict[str, Any] = {}

    def windowed(self, window: int | None) -> TreePlan:
        """The same queries and keys with a sliding window, planned once; the plan itself if no root
        path is longer than the window."""
        if window is None or window >= self.longest_path or window == self.window:
            return self
        assert self.window is None, (self.window, window)
        arguments = self.layout, self.device, self.q_tokens, self.kv_tokens, window
        return self.once(f"window {window}", lambda _: TreePlan(*arguments))

    @cached_property
    def longest_path(self) -> int:
        """Tokens of the longest root path of the row."""
        return self.layout.longest_path

    @property
    def num_queries(self) -> int:
        return self.layout.num_tokens if self.q_tokens is None else len(self.q_tokens)

    @property
    def num_keys(self) -> int:
        return self.layout.num_tokens if self.kv_tokens is None else len(self.kv_tokens)

    @cached_property
    def path(self) -> PathPlan:
        """The leaf-path plan, for the backends `path`, `flash` and `te`."""
        return build_path_plan(self.layout, self.device, self.q_tokens, self.kv_tokens, self.window)

    def once(self, name: str, build: Callable[[TreePlan], T]) -> T:
        """`build(self)`, computed at the first call with this `name` and then kept."""
        if name not in self._built:
            self._built[name] = build(self)
        return self._built[name]


def build_path_plan(
    layout: TreeLayout,
    device: torch.device | str,
    q_tokens: np.ndarray | None = None,
    kv_tokens: np.ndarray | None = None,
    window: int | None = None,
) -> PathPlan:
    """Cut `layout` after every leaf, and at gaps of `q_tokens`; see the module's example."""
    q_lengths, last_tokens = cut_into_pieces(layout, q_tokens)
    kv_index, kv_lengths = seen_paths(layout, q_lengths, last_tokens, window)
    num_keys = layout.num_tokens
    if kv_tokens is not None:
        # From token indices to indices among the held keys: kv_tokens [0, 1, 2, 5, 6, 7] has
        # token 5 at index 3.
        num_keys = len(kv_tokens)
        kv_index, tokens = np.searchsorted(kv_tokens, kv_index), kv_index
        is_held = np.take(kv_tokens, kv_index, mode="clip") == tokens
        assert is_held.all(), "a query's path is missing"

    # lengths [3, 2, 4], parents [-1, 0, 0]:  copies [2 2 2 1 1 1 1 1 1]; own keys come last in a
    # piece, so they begin at gathered keys 0 and 8, which are the tokens own_starts [0, 5]
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
        window=window,
    )


def _ancestor_starts(
    kv_index: np.ndarray, q_lengths: np.ndarray, kv_lengths: np.ndarray
) -> list[int]:
    """The first of each piece's ancestor keys if they are contiguous, else -1."""
    # n ascending keys are contiguous if the last is the first + n - 1. Ancestors 0 1 2 start at
    # 0; ancestors 0 1 2 5, with a sibling left out, give -1. Without ancestors the entry is unused.
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
