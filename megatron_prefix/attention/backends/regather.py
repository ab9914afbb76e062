"""Attention to keys that are brought for a layer and not kept: they are brought again in backward.

Keys travel between ranks (context_parallel.py) or are copied together along root paths (te.py).
A kernel with a backward pass of its own would keep what was brought alive, for every layer until
its backward. Here it keeps a note instead, and the keys are brought again when it asks.

Shapes: L queries, S own keys, S_b brought keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Way:
    """How a layer's keys and values come, and how their gradients go back.

    `bring(k, v)` maps [S, G, H] each to two new contiguous tensors [S_b, G, H];
    `give_back(dk, dv)` is its transpose. Both are linear, without autograd of their own.
    """

    bring: Callable[[Tensor, Tensor], Pair]
    give_back: Callable[[Tensor, Tensor], Pair]


def attend_to_brought(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, way: Way
) -> Tensor:
    """`attend(q, *way.bring(k, v))`, differentiable, keeping only `k` and `v` for backward.

    What `attend` saves of the brought tensors and of views of them is dropped and brought again; of
    copies that it makes of them nothing is known, so they are kept. Nests.
    """
    brought = _Bring.apply(q, k, v, way)
    node = brought[0].grad_fn
    if node is None:  # nothing is saved where nothing is differentiated
        return attend(q, *brought)
    again = _Again(node)
    spans = [(x.untyped_storage().data_ptr(), x.storage_offset(), x.numel()) for x in brought]
    dtype = k.dtype

    def pack(x: Tensor) -> Tensor | _View:
        for which, (storage, start, length) in enumerate(spans):
            offset = x.storage_offset() - start
            if x.untyped_storage().data_ptr() == storage and 0 <= offset < length:
                return x if x.dtype != dtype else _View(which, x.size(), x.stride(), offset)
        return x

    def unpack(kept: Tensor | _View) -> Tensor:
        return again.view(kept) if isinstance(kept, _View) else kept

    with saved_tensors_hooks(pack, unpack):
        return attend(q, *brought)


class _Bring(torch.autograd.Function):
    """`q` takes part so that there is a node to save own keys in whatever requires gradients."""

    @staticmethod
    def forward(ctx, q, k, v, way):
        ctx.save_for_backward(k, v)
        ctx.way = way
        return way.bring(k, v)

    @staticmethod
    def backward(ctx, grad_k, grad_v):
        return None, *ctx.way.give_back(grad_k, grad_v), None


class _View(NamedTuple):
    """A view of one of the brought tensors; `offset` is counted from its first entry."""

    which: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class _Again:
    """Own keys are read from where `_Bring` saved them, so that hooks around this one hold."""

    node: Node

    @cached_property
    def keys(self) -> Pair:
        with torch.no_grad():
            return self.node.way.bring(*self.node.saved_tensors)

    def view(self, of: _View) -> Tensor:
        keys = self.keys[of.which]
        return keys.as_strided(of.size, of.stride, keys.storage_offset() + of.offset)
