"""FlexAttention: torch's compiled attention with a mask of blocks.

No keys are gathered. A key is seen by one interval of queries: from itself to the end of its
subtree. So the mask of blocks follows from the ends of these intervals, without a look at pairs
of tokens. For blocks of B tokens, with `first` and `end` of the intervals of a block of keys,

    blocks of queries [floor(min first / B), ceil(max end / B))    see some of its keys
    blocks of queries [ceil(max first / B), floor(min end / B))    see all of them, without a mask

In blocks that see some keys, each pair is checked by two lookups. In a plan of some tokens, a
key's interval counts the plan's queries.

With a sliding window, a key is seen by those of its interval that are less than a window deeper. So
a block of queries sees none of a block of keys if its least deep query is a window deeper than the
deepest of these keys, and sees all of them only if its deepest query is less than that deeper than
the least deep key. A soft cap changes each score, and sinks follow from the log-sum-exp, which is
differentiable here.

Rows of different lengths use the same compiled graph, which is made from the first two rows.
Number of heads, head dim, dtype, scale, with and without gradients, plans of all tokens and of
some, and rows of at most one block each have a graph of their own. If torch refuses to compile
more graphs, the call fails; it never computes dense scores instead. On CPU torch has only the
forward pass.

Shapes: L queries, S keys, N query heads, G key/value heads, H head dim; Q and K blocks of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention.backends.backend import Backend, Scoring
from megatron_prefix.attention.backends.requirements import head_dim_fault, why_not_on_cuda
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.errors import RunError
from megatron_prefix.layout import TreeLayout
from megatron_prefix.platform import on_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_CAPABILITY = (7, 0)
"""The least compute capability for Triton, to which torch compiles the kernel."""
MAX_GRAPHS = 64
"""Graphs of the call that a process may compile. torch's default limit is 8 per function."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_flex(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """What prevents training with this backend, with the remedy; else None."""
    if device.type == "cpu":
        return "on CPU FlexAttention has no backward pass; use attention_backend path or auto"
    return why_not_on_cuda(
        device,
        dtype,
        dtypes=DTYPES,
        capability=MIN_CAPABILITY,
        module="triton",
        remedy="install the `triton` that this torch names, or use attention_backend flash",
    ) or head_dim_fault(head_dim, least=MIN_HEAD_DIM, most=MAX_HEAD_DIM)


def query_intervals(
    layout: TreeLayout, q_tokens: np.ndarray | None = None, kv_tokens: np.ndarray | None = None
) -> np.ndarray:
    """int32 [2, S]: key s is seen by the queries from `[0, s]` up to, not including, `[1, s]`.

    Tokens are as in `TreePlan`. First queries ascend.
    """
    # lengths [3, 2, 4], parents [-1, 0, 0]:  first [0 1 2 3 4 5 6 7 8], end [9 9 9 5 5 9 9 9 9]
    # with q_tokens [3, 4, 6, 7] as queries 0..4:  first [0 0 0 0 1 2 2 3 4], end [4 4 4 2 2 4 …]
    tokens = np.arange(layout.num_tokens) if kv_tokens is None else kv_tokens
    seen = np.stack([tokens, layout.token_subtree_ends()[tokens]])
    return (seen if q_tokens is None else np.searchsorted(q_tokens, seen)).astype(np.int32)


def block_ranges(intervals: np.ndarray, num_queries: int, block: int) -> np.ndarray:
    """int32 [4, K]: for each block of keys the blocks of queries `[0] : [1]` that see some of it,
    and `[2] : [3]` that see all of it. An interval is empty if its start and end are equal.

    A block that is cut short by the row's end is never seen as a whole.
    """
    # The intervals of lengths [3, 2, 4], parents [-1, 0, 0], in blocks of 4:
    #   keys   0..4         4..8         8        (padded with first = end = 0, seen by nobody)
    #   first  0 1 2 3      4 5 6 7      8
    #   end    9 9 9 5      5 9 9 9      9
    #   some   [0, 3)       [1, 3)       [2, 3)
    #   all    [1, 1)       [1, 1)       [0, 0)
    num_blocks = -(-intervals.shape[1] // block)
    missing = num_blocks * block - intervals.shape[1]
    first, end = np.pad(intervals, ((0, 0), (0, missing))).reshape(2, num_blocks, block)
    is_seen = end > first
    some_start = np.where(is_seen, first, num_queries).min(1, initial=num_queries) // block
    some_end = -(-np.where(is_seen, end, 0).max(1, initial=0) // block)
    all_start = -(-first.max(1, initial=0) // block)
    all_end = end.min(1, initial=num_queries) // block
    some_start, all_start = np.minimum(some_start, some_end), np.minimum(all_start, all_end)
    return np.stack([some_start, some_end, all_start, all_end]).astype(np.int32)


def block_mask(
    layout: TreeLayout,
    device: torch.device,
    q_tokens: np.ndarray | None = None,
    kv_tokens: np.ndarray | None = None,
    block: int = BLOCK,
    window: int | None = None,
) -> BlockMask:
    """torch's `BlockMask` of a layout, or of some of its queries and keys."""
    from torch.nn.attention.flex_attention import BlockMask

    intervals = query_intervals(layout, q_tokens, kv_tokens)
    num_keys = intervals.shape[1]
    num_queries = layout.num_tokens if q_tokens is None else len(q_tokens)
    ranges = on_device(block_ranges(intervals, num_queries, block), device)
    first, end = on_device(intervals, device)

    def sees(batch, head, q, k):
        return (first[k] <= q) & (q < end[k])

    q_block = torch.arange(-(-num_queries // block), device=device).unsqueeze(1)
    is_some = (ranges[0] <= q_block) & (q_block < ranges[1])
    is_all = (ranges[2] <= q_block) & (q_block < ranges[3])
    mask_mod = sees
    if window is not None:
        depths = layout.position_ids().astype(np.int32)
        q_depths, k_depths = (depths if x is None else depths[x] for x in (q_tokens, kv_tokens))
        q_depth, k_depth = on_device(q_depths, device), on_device(k_depths, device)

        def sees_in_window(batch, head, q, k):
            return sees(batch, head, q, k) & (q_depth[q] - k_depth[k] < window)

        mask_mod = sees_in_window
        bounds = (depth_bounds(x, block) for x in (q_depths, k_depths))
        (q_least, q_most), (k_least, k_most) = (on_device(x, device) for x in bounds)
        is_some = is_some & (q_least.unsqueeze(1) - k_most < window)
        is_all = is_all & (q_most.unsqueeze(1) - k_least < window)
    return BlockMask.from_kv_blocks(
        *_listed(is_some & ~is_all),
        *_listed(is_all),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )


def depth_bounds(depths: np.ndarray, block: int) -> np.ndarray:
    """int32 [2, blocks]: the least and the greatest depth of each block of tokens."""
    # depths [0 1 2 3 4 3 4 5 6] in blocks of 4:  least [0, 3, 6], greatest [3, 5, 6]
    num_blocks = -(-len(depths) // block)
    missing = num_blocks * block - len(depths)
    by_block = np.pad(depths, (0, missing), mode="edge").reshape(num_blocks, block)
    return np.stack([by_block.min(1), by_block.max(1)])


def plan_block_mask(plan: TreePlan) -> BlockMask:
    """A plan's `BlockMask`, built once."""
    return plan.once(
        "block_mask",
        lambda p: block_mask(p.layout, p.device, p.q_tokens, p.kv_tokens, window=p.window),
    )


def _listed(is_set: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, K] -> for each block of queries the number of its blocks of keys [1, 1, Q], and
    their indices first in [1, 1, Q, K]: [[0, 1, 1]] -> [2], [[1, 2, 0]]."""
    counts = is_set.sum(1, dtype=torch.int32)
    order = is_set.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """torch's kernel. Each kind of call is compiled once; none runs uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, scoring: Scoring
) -> Tensor:
    """Tree attention under a plan's block mask; arguments as `tree_attention` checks them.

    Raises RunError if this process has compiled `MAX_GRAPHS` graphs of the call already.
    """
    sinks = scoring.sinks
    if q.size(0) == 0:  # no kernel accepts an empty row; the sum keeps all inputs in the graph
        return q + (k.sum() + v.sum()) + (0 if sinks is None else 0 * sinks.sum().to(q.dtype))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    settings = {
        "block_mask": mask,
        "scale": scoring.scale,
        "enable_gqa": q.size(1) != k.size(1),
        "score_mod": None if scoring.softcap is None else soft_cap(scoring.softcap),
    }
    with _graphs_up_to(MAX_GRAPHS):
        if sinks is None:
            out = compiled()(q, k, v, **settings)
        else:
            out, lse = compiled()(q, k, v, **settings, **_with_lse())
            lse = lse if isinstance(lse, Tensor) else lse.lse
            share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None]).unsqueeze(-1)
            out = (out * share).to(out.dtype)
    return out.squeeze(0).transpose(0, 1)


@functools.lru_cache(maxsize=16)
def soft_cap(cap: float) -> Callable[..., Tensor]:
    """torch's `score_mod` of a soft cap; the same function each time, so that torch compiles one
    graph."""

    def bounded(score, batch, head, q, k):
        return cap * torch.tanh(score / cap)

    return bounded


def _with_lse() -> dict[str, object]:
    """The argument that makes torch return the log-sum-exp too; torch 2.9 renamed it."""
    from torch.nn.attention import flex_attention

    if hasattr(flex_attention, "AuxRequest"):
        return {"return_aux": flex_attention.AuxRequest(lse=True)}
    return {"return_lse": True}


@contextlib.contextmanager
def _graphs_up_to(most: int) -> Iterator[None]:
    """Allow `most` compiled graphs per function inside, or torch's own setting if it is higher."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    most = max(most, config.recompile_limit)
    try:
        # A soft cap is a constant of its graph: torch cannot differentiate a function of scores
        # that takes a number from outside of the graph (2.13: PendingUnbackedSymbolNotFound).
        with config.patch(recompile_limit=most, specialize_float=True):
            yield
    except FailOnRecompileLimitHit as error:
        raise RunError(
            f"attention_backend flex: this process has compiled {most} forms of the call (heads, "
            "head dim, dtype, scale, with and without gradients, ...) and torch compiles no more; "
            "raise torch._dynamo.config.recompile_limit, call torch._dynamo.reset() between "
            "models, or use attention_backend flash or path"
        ) from error


BACKEND = Backend(
    why_not=why_not_flex,
    prepare=plan_block_mask,
    attend=lambda q, k, v, plan, scoring: flex_tree_attention(
        q, k, v, plan_block_mask(plan), scoring
    ),
)
