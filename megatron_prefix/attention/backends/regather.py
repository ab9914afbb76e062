"""Attention over gathered keys that are not saved for backward but gathered again.

Keys are gathered from other ranks (context_parallel/transports.py) or along root paths (te.py).
A kernel with its own backward pass would save the gathered keys of every layer until backward.
Here autograd's hooks save a note in their place, and the keys are gathered again when backward
first reads one of these notes:

    forward    k, v  --gather-->  K, V  --attend-->  out     saved: k, v, and notes for K and V
    backward   k, v  --gather-->  K, V  ->  dK, dV  --scatter-->  dk, dv

Shapes: L queries, S own keys, S_g gathered keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

KeysAndValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class KeyGather:
    """The gather of a layer's keys and values, and its transpose for their gradients.

    `gather(k, v)` maps two tensors [S, G, H] to two new contiguous tensors [S_g, G, H].
    `scatter(dk, dv)` maps two tensors [S_g, G, H] to [S, G, H]: it sums the gradients of all
    copies of a key. Both are linear and run outside autograd.
    """

    gather: Callable[[Tensor, Tensor], KeysAndValues]
    scatter: Callable[[Tensor, Tensor], KeysAndValues]


def attend_gathered(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_gather: KeyGather,
) -> Tensor:
    """`attend(q, *key_gather.gather(k, v))`, differentiable; saves only `k` and `v` for backward.

    If `attend` saves the gathered tensors or views of them, notes are saved instead. Copies that
    it makes cannot be recognised and are saved. Calls may be nested.
    """
    gathered = _Gather.apply(q, k, v, key_gather)
    node = gathered[0].grad_fn
    if node is None:  # no input requires gradients, so nothing is saved
        return attend(q, *gathered)
    regather = _Regather(node)
    spans = [(x.untyped_storage().data_ptr(), x.storage_offset(), x.numel()) for x in gathered]
    dtype = k.dtype

    # A saved tensor is a view of gathered tensor i if it starts inside the memory of i. For
    # example keys[5:] of a contiguous [10, 2, 4] tensor: same storage, offset 40 of 80 entries.
    def pack(x: Tensor) -> Tensor | _View:
        for index, (storage, start, length) in enumerate(spans):
            offset = x.storage_offset() - start
            if x.untyped_storage().data_ptr() == storage and 0 <= offset < length:
                return x if x.dtype != dtype else _View(index, x.size(), x.stride(), offset)
        return x

    def unpack(saved: Tensor | _View) -> Tensor:
        return regather.view(saved) if isinstance(saved, _View) else saved

    with saved_tensors_hooks(pack, unpack):
        return attend(q, *gathered)


class _Gather(torch.autograd.Function):
    """`q` is an input so that a node exists, and saves own keys, if only `q` needs gradients."""

    @staticmethod
    def forward(ctx, q, k, v, key_gather):
        ctx.save_for_backward(k, v)
        ctx.key_gather = key_gather
        return key_gather.gather(k, v)

    @staticmethod
    def backward(ctx, grad_k, grad_v):
        return None, *ctx.key_gather.scatter(grad_k, grad_v), None


class _View(NamedTuple):
    """The note: a view of one gathered tensor. `offset` counts from the tensor's first entry."""

    tensor_index: int
    """0 for keys, 1 for values."""
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class _Regather:
    """Gathers again, once. Own keys come from the node that saved them, so that outer hooks on
    saved tensors apply to them."""

    node: Any
    """The autograd node of `_Gather`: its `ctx`."""

    @cached_property
    def keys_and_values(self) -> KeysAndValues:
        with torch.no_grad():
            return self.node.key_gather.gather(*self.node.saved_tensors)

    def view(self, view: _View) -> Tensor:
        tensor = self.keys_and_values[view.tensor_index]
        return tensor.as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)
