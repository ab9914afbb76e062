"""Context parallelism: how keys and values move between the ranks that share a row.

Each rank computes the queries of its own tokens (see ownership.py). There are three transports for
the keys and values that these queries see:

    all_gather    every rank gets the keys of all tokens; gradients return by reduce-scatter in
                  float32
    needed_rows   a rank gets only the keys on the root paths of its tokens, by an all-to-all of
                  unequal parts, planned once per micro batch; gradients return the same way in
                  float32
    all_to_all    a rank gets all tokens for its share of the heads (Ulysses, arXiv 2309.14509), and
                  sends the outputs of its heads back

The first two gather keys again in backward, so that not every layer's copy has to be kept. A layer
with a sliding window needs fewer keys: `needed_rows` then sends only those that the window shows.

Shapes: T tokens of the row, L = T / ranks own tokens, S keys held, N query heads, G key/value
heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.attention.api import tree_attention
from megatron_prefix.attention.backends import KeyGather, KeysAndValues, attend_gathered
from megatron_prefix.attention.context_parallel import ownership
from megatron_prefix.attention.context_parallel.ownership import ContextCost
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.layout import TreeLayout
from megatron_prefix.platform import on_device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The ranks that share rows, and their transport: `comm` is one of the three above."""

    group: dist.ProcessGroup
    comm: str
    cost: ContextCost

    def share(self, layout: TreeLayout, device: torch.device) -> ContextShare:
        """This rank's part of a row, whose number of tokens is a multiple of the ranks."""
        size = self.group.size()
        if self.comm == "all_to_all":  # every rank attends to all tokens: nothing to balance
            parts = ownership.contiguous(layout, size)
        else:
            cost = self.cost if self.comm == "needed_rows" else replace(self.cost, per_key=0.0)
            parts = ownership.tree_aware(layout, size, cost)
        own = parts[self.group.rank()]
        transport: Transport
        if self.comm == "needed_rows":
            transport = NeededTokens(self.group, layout, parts, device)
            plan = TreePlan(layout, device, own, transport.tokens)
        elif self.comm == "all_gather":
            transport = AllGather(self.group, parts, device)
            plan = TreePlan(layout, device, own)
        else:
            transport = Heads(self.group, parts, device)
            plan = TreePlan(layout, device)
        return ContextShare(self.group, own, plan, transport)


@dataclass(frozen=True, eq=False)
class ContextShare:
    """One rank's part of one row."""

    group: dist.ProcessGroup
    tokens: np.ndarray
    """The tokens that this rank owns, ascending, int64 [L]."""
    plan: TreePlan
    transport: Transport
    by_window: dict[int, ContextShare] = field(default_factory=dict)
    """Shares of layers with a sliding window, made when first used."""

    def windowed(self, window: int | None) -> ContextShare:
        """The same tokens for a layer with a sliding window of so many tokens; None has none."""
        if window is None or window >= self.plan.longest_path:
            return self
        if window not in self.by_window:
            plan, transport = self.plan.windowed(window), self.transport
            if isinstance(transport, NeededTokens):
                transport = transport.windowed(window)
                plan = TreePlan(plan.layout, plan.device, self.tokens, transport.tokens, window)
            self.by_window[window] = replace(self, plan=plan, transport=transport)
        return self.by_window[window]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: str,
        scale: float | None,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        fuses_sums: bool = False,
    ) -> Tensor:
        """Attention of own queries [L, N, H], given own keys and values [L, G, H] -> [L, N, H].

        The other arguments are those of `tree_attention`; `sinks` are those of all N heads.
        """
        share = self.windowed(window)
        if sinks is not None:
            sinks = share.transport.own_heads(sinks)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tree_attention(
                q,
                k,
                v,
                share.plan,
                backend=backend,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                fuses_sums=fuses_sums,
            )

        return share.transport.attend(attend, q, k, v)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks; backward passes the gradient to every rank as it is."""
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


class _AllTokens:
    """The two orders of a row's tokens: `rank_order`, rank after rank, and `row_order` back."""

    def __init__(
        self, group: dist.ProcessGroup, parts: Sequence[np.ndarray], device: torch.device
    ) -> None:
        # parts [0, 3] and [1, 2]:  rank_order [0, 3, 1, 2],  row_order [0, 2, 3, 1]
        #   row[rank_order] is in the order of the ranks, gathered[row_order] in that of the row
        self.group = group
        gathered = np.concatenate(parts)
        self.rank_order = on_device(gathered, device)
        self.row_order = on_device(np.argsort(gathered), device)


class _AllHeads:
    """A transport after which a rank has all heads of some queries."""

    def own_heads(self, per_head: Tensor) -> Tensor:
        """[N] -> the entries of the heads that this rank computes."""
        return per_head


class AllGather(_AllHeads, _AllTokens):
    """The keys of all tokens on every rank."""

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend_with_keys(attend, q, k, v, self)

    def bytes_sent(self, num_heads: int, num_groups: int, head_dim: int, itemsize: int) -> int:
        """Bytes that this rank sends for one layer, forward and backward."""
        size = self.group.size()
        num_tokens = len(self.rank_order) // size * (size - 1)
        return num_tokens * 2 * num_groups * head_dim * (2 * itemsize + max(itemsize, 4))

    def gather(self, keys: Tensor) -> Tensor:
        """Own keys [L, ...] -> all keys [T, ...] in the row's order."""
        gathered = keys.new_empty(len(self.rank_order), *keys.shape[1:])
        dist.all_gather_into_tensor(gathered, keys.contiguous(), group=self.group)
        return gathered.index_select(0, self.row_order)

    def reduce_scatter(self, grad: Tensor) -> Tensor:
        """The transpose of `gather`, in float32 or better."""
        exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
        own = exact.new_empty(len(self.rank_order) // self.group.size(), *grad.shape[1:])
        ordered = exact.index_select(0, self.rank_order)
        dist.reduce_scatter_tensor(own, ordered, group=self.group)
        return own.to(grad.dtype)


class NeededTokens(_AllHeads):
    """The keys on the root paths of a rank's tokens, and no others; with a sliding window, only
    those that it shows.

    `tokens`, ascending, are those whose keys this rank holds after `gather`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        layout: TreeLayout,
        parts: Sequence[np.ndarray],
        device: torch.device,
        window: int | None = None,
    ) -> None:
        # Rank 1 of 2, for lengths [3, 2, 4], parents [-1, 0, 0] and 1 token of padding; parts
        # [0 1 2 3 4], [5 6 7 8 9]. It needs 0 1 2 5 6 7 8 9 and gives nothing to rank 0:
        #   received   [3, 0]                   keys that arrive from each rank: 0 1 2
        #   sent       [0, 0]                   rank 0 has [0, 3], and send_index [0, 1, 2]
        #   held       5 6 7 8 9 0 1 2          own keys, then received ones by rank
        #   row_order  [5, 6, 7, 0, 1, 2, 3, 4] held keys -> ascending; arrival_order is its inverse
        self.group, rank = group, group.rank()
        self.row = group, layout, parts, device
        needed = [needed_tokens(layout, own, window) for own in parts]
        owner = np.empty(layout.num_tokens, np.int64)
        for other, own in enumerate(parts):
            owner[own] = other
        self.tokens = needed[rank]
        foreign = self.tokens[owner[self.tokens] != rank]
        foreign = foreign[np.argsort(owner[foreign], kind="stable")]
        self.received = np.bincount(owner[foreign], minlength=len(parts)).tolist()
        sent = [
            np.searchsorted(parts[rank], x[(owner[x] == rank)]) if other != rank else x[:0]
            for other, x in enumerate(needed)
        ]
        self.sent = [len(x) for x in sent]
        self.send_index = on_device(np.concatenate(sent), device)
        self.num_own = len(parts[rank])
        held = np.concatenate([parts[rank], foreign])
        order = np.argsort(held)
        self.row_order = on_device(order, device)
        self.arrival_order = on_device(np.argsort(order), device)

    def windowed(self, window: int) -> NeededTokens:
        """The same row and ranks, with the keys that a sliding window shows."""
        return NeededTokens(*self.row, window)

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend_with_keys(attend, q, k, v, self)

    def bytes_sent(self, num_heads: int, num_groups: int, head_dim: int, itemsize: int) -> int:
        """Bytes that this rank sends for one layer, forward and backward."""
        entries = 2 * num_groups * head_dim
        return entries * (2 * sum(self.sent) * itemsize + sum(self.received) * max(itemsize, 4))

    def gather(self, keys: Tensor) -> Tensor:
        """Own keys [L, ...] -> needed keys [S, ...] in the row's order."""
        received = keys.new_empty(sum(self.received), *keys.shape[1:])
        parts = keys.index_select(0, self.send_index)
        dist.all_to_all_single(received, parts, self.received, self.sent, group=self.group)
        return torch.cat([keys, received]).index_select(0, self.row_order)

    def reduce_scatter(self, grad: Tensor) -> Tensor:
        """The transpose of `gather`, in float32 or better, summed in the order of ranks."""
        exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
        own, foreign = exact.index_select(0, self.arrival_order).split(
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
            own[index] += part  # a rank needs a key once, so no index repeats
        return own.to(grad.dtype)


class Heads(_AllTokens):
    """All tokens, for this rank's share of the heads."""

    def own_heads(self, per_head: Tensor) -> Tensor:
        """[N] -> the entries of the heads that this rank computes, [N / ranks]."""
        return per_head.chunk(self.group.size())[self.group.rank()]

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(_ToAllTokens.apply(x, self) for x in (q, k, v)))
        return _ToAllHeads.apply(out, self)

    def bytes_sent(self, num_heads: int, num_groups: int, head_dim: int, itemsize: int) -> int:
        """Bytes that this rank sends for one layer, forward and backward."""
        size = self.group.size()
        entries = len(self.rank_order) // size * (2 * num_heads + 2 * num_groups) * head_dim
        return 2 * entries * (size - 1) // size * itemsize

    def to_all_tokens(self, x: Tensor) -> Tensor:
        """Own tokens, all heads [L, N, H] -> all tokens, own heads [T, N / ranks, H]."""
        size = self.group.size()
        parts = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # [ranks, L, N / ranks, H]
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received.flatten(0, 1).index_select(0, self.row_order)

    def to_all_heads(self, x: Tensor) -> Tensor:
        """The inverse of `to_all_tokens`, which is also its transpose."""
        size = self.group.size()
        parts = x.index_select(0, self.rank_order)
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


class _ToAllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transport):
        ctx.transport = transport
        return transport.to_all_tokens(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.transport.to_all_heads(grad), None


class _ToAllHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transport):
        ctx.transport = transport
        return transport.to_all_heads(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.transport.to_all_tokens(grad), None


Transport = AllGather | NeededTokens | Heads


def _attend_with_keys(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, transport: AllGather | NeededTokens
) -> Tensor:
    """Attention over keys and values that are gathered in one message, and again in backward."""

    def together(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], KeysAndValues]:
        def moved(k: Tensor, v: Tensor) -> KeysAndValues:
            both = move(torch.stack([k, v], dim=1))
            return both[:, 0].contiguous(), both[:, 1].contiguous()

        return moved

    key_gather = KeyGather(
        gather=together(transport.gather), scatter=together(transport.reduce_scatter)
    )
    return attend_gathered(attend, q, k, v, key_gather)
