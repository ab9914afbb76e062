"""Context parallelism: a row's tokens over ranks, and how keys travel between them.

Each rank computes the queries of its own tokens (see ownership.py). Three transports bring it the
keys and values that these see:

    all_gather    every rank gets all rows; gradients come back by a float32 reduce-scatter
    needed_rows   a rank gets the rows on its tokens' root paths only, by an all-to-all of uneven
                  parts planned once a micro batch; gradients go back the same way in float32
    all_to_all    a rank gets all rows for its share of the heads (Ulysses, arXiv 2309.14509), and
                  sends its heads' outputs back

The first two bring keys again in backward instead of keeping every layer's copy alive.

Shapes: T tokens of the row, L = T / ranks own tokens, S keys held, N query heads, G key/value
heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention.api import tree_attention
from megatron_prefix.attention.backends.regather import Pair, Way, attend_to_brought
from megatron_prefix.attention.context_parallel import ownership
from megatron_prefix.attention.context_parallel.ownership import ContextCost
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.layout import TreeLayout
from megatron_prefix.platform.transfer import on_device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The ranks that share rows, and how: one of the transports above."""

    group: dist.ProcessGroup
    comm: str
    cost: ContextCost

    def share(self, layout: TreeLayout, device: torch.device) -> ContextShare:
        """This rank's part of a row; the number of tokens is a multiple of the ranks."""
        size = self.group.size()
        if self.comm == "all_to_all":  # heads balance attention by themselves
            rows = ownership.contiguous(layout, size)
        else:
            cost = self.cost if self.comm == "needed_rows" else replace(self.cost, per_key=0.0)
            rows = ownership.tree_aware(layout, size, cost)
        own = rows[self.group.rank()]
        if self.comm == "needed_rows":
            keys = NeededRows(self.group, layout, rows, device)
            plan = TreePlan(layout, device, own, keys.rows)
        elif self.comm == "all_gather":
            keys = AllGather(self.group, rows, device)
            plan = TreePlan(layout, device, own)
        else:
            keys = Heads(self.group, rows, device)
            plan = TreePlan(layout, device)
        return ContextShare(self.group, own, plan, keys)


@dataclass(frozen=True, eq=False)
class ContextShare:
    """What one rank has of one row: its `rows`, who they see, and how keys travel."""

    group: dist.ProcessGroup
    rows: np.ndarray
    plan: TreePlan
    transport: AllGather | NeededRows | Heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str, scale: float | None) -> Tensor:
        """Attention of own queries [L, N, H] with own keys and values [L, G, H] -> [L, N, H]."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tree_attention(q, k, v, self.plan, backend=backend, scale=scale)

        return self.transport.attend(attend, q, k, v)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, whose gradient every rank takes for its own part as it is."""
        return _SumOverRanks.apply(values, self.group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _WholeRow:
    """Both orders of a whole row: `by_rank` as its parts stand on the ranks, and `by_row` back."""

    def __init__(
        self, group: dist.ProcessGroup, rows: Sequence[np.ndarray], device: torch.device
    ) -> None:
        self.group = group
        gathered = np.concatenate(rows)
        self.by_rank = on_device(gathered, device)
        self.by_row = on_device(np.argsort(gathered), device)


class AllGather(_WholeRow):
    """All rows of keys on every rank."""

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _with_keys(attend, q, k, v, self)

    def bytes_sent(self, num_heads: int, num_groups: int, head_dim: int, itemsize: int) -> int:
        """Bytes that this rank sends for one layer, forward and backward."""
        size = self.group.size()
        rows = len(self.by_rank) // size * (size - 1)
        return rows * 2 * num_groups * head_dim * (2 * itemsize + max(itemsize, 4))

    def bring(self, keys: Tensor) -> Tensor:
        """Own rows [L, ...] -> all rows [T, ...] in their order."""
        found = keys.new_empty(len(self.by_rank), *keys.shape[1:])
        dist.all_gather_into_tensor(found, keys.contiguous(), group=self.group)
        return found.index_select(0, self.by_row)

    def give_back(self, grad: Tensor) -> Tensor:
        """The transpose of `bring`, in float32 at least."""
        exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
        found = exact.new_empty(len(self.by_rank) // self.group.size(), *grad.shape[1:])
        ordered = exact.index_select(0, self.by_rank)
        dist.reduce_scatter_tensor(found, ordered, group=self.group)
        return found.to(grad.dtype)


class NeededRows:
    """The rows on the root paths of a rank's tokens, and no others.

    `rows`, ascending, are those that this rank holds keys for.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        layout: TreeLayout,
        rows: Sequence[np.ndarray],
        device: torch.device,
    ) -> None:
        self.group, rank = group, group.rank()
        needed = [ownership.needed_rows(layout, own) for own in rows]
        owner = np.empty(layout.num_tokens, np.int64)
        for other, own in enumerate(rows):
            owner[own] = other
        self.rows = needed[rank]
        foreign = self.rows[owner[self.rows] != rank]
        foreign = foreign[np.argsort(owner[foreign], kind="stable")]  # as they arrive
        self.received = np.bincount(owner[foreign], minlength=len(rows)).tolist()
        sent = [
            np.searchsorted(rows[rank], x[(owner[x] == rank)]) if other != rank else x[:0]
            for other, x in enumerate(needed)
        ]
        self.sent = [len(x) for x in sent]
        self.send_index = on_device(np.concatenate(sent), device)
        self.num_own = len(rows[rank])
        arrived = np.concatenate([rows[rank], foreign])
        order = np.argsort(arrived)
        self.by_row = on_device(order, device)
        self.by_arrival = on_device(np.argsort(order), device)

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _with_keys(attend, q, k, v, self)

    def bytes_sent(self, num_heads: int, num_groups: int, head_dim: int, itemsize: int) -> int:
        """Bytes that this rank sends for one layer, forward and backward."""
        row = 2 * num_groups * head_dim
        return row * (2 * sum(self.sent) * itemsize + sum(self.received) * max(itemsize, 4))

    def bring(self, keys: Tensor) -> Tensor:
        """Own rows [L, ...] -> needed rows [S, ...] in their order."""
        found = keys.new_empty(sum(self.received), *keys.shape[1:])
        parts = keys.index_select(0, self.send_index)
        dist.all_to_all_single(found, parts, self.received, self.sent, group=self.group)
        return torch.cat([keys, found]).index_select(0, self.by_row)

    def give_back(self, grad: Tensor) -> Tensor:
        """The transpose of `bring`, in float32 at least, summed in the order of ranks."""
        exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
        own, foreign = exact.index_select(0, self.by_arrival).split(
            [self.num_own, sum(self.received)]
        )
        parts = exact.new_empty(sum(self.sent), *grad.shape[1:])
        dist.all_to_all_single(
            parts, foreign.contiguous(), self.sent, self.received, group=self.group
        )
        own = own.clone()
        for index, part in zip(
            self.send_index.split(self.sent), parts.split(self.sent), strict=True
        ):
            own[index] += part  # a rank needs a row once, so that no index repeats
        return own.to(grad.dtype)


class Heads(_WholeRow):
    """All rows of a share of the heads."""

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(_HeadsForRows.apply(x, self) for x in (q, k, v)))
        return _RowsForHeads.apply(out, self)

    def bytes_sent(self, num_heads: int, num_groups: int, head_dim: int, itemsize: int) -> int:
        """Bytes that this rank sends for one layer, forward and backward."""
        size = self.group.size()
        entries = len(self.by_rank) // size * (2 * num_heads + 2 * num_groups) * head_dim
        return 2 * entries * (size - 1) // size * itemsize

    def to_rows(self, x: Tensor) -> Tensor:
        """Own rows of all heads [L, N, H] -> all rows of own heads [T, N / ranks, H]."""
        size = self.group.size()
        parts = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=self.group)
        return found.flatten(0, 1).index_select(0, self.by_row)

    def to_heads(self, x: Tensor) -> Tensor:
        """The inverse of `to_rows`, and its transpose."""
        size = self.group.size()
        parts = x.index_select(0, self.by_rank)
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=self.group)
        return found.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


class _HeadsForRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transport):
        ctx.transport = transport
        return transport.to_rows(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.transport.to_heads(grad), None


class _RowsForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transport):
        ctx.transport = transport
        return transport.to_heads(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.transport.to_rows(grad), None


def _with_keys(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, transport: AllGather | NeededRows
) -> Tensor:
    """Attention to keys that travel in one message with their values, and again in backward."""

    def both(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Pair]:
        def moved(k: Tensor, v: Tensor) -> Pair:
            found = move(torch.stack([k, v], dim=1))
            return found[:, 0].contiguous(), found[:, 1].contiguous()

        return moved

    return attend_to_brought(attend, q, k, v, Way(both(transport.bring), both(transport.give_back)))
