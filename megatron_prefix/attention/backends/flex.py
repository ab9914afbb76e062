"""FlexAttention: torch's compiled attention, told which blocks of the row see one another.

No keys are gathered. Each key is seen by one interval of the queries, those from its own row to
the end of its subtree, so a mask of blocks follows from the intervals' ends without looking at a
pair of tokens. For blocks of B tokens, with `first` and `end` of the intervals of a block of keys,

    blocks of queries [floor(min first / B), ceil(max end / B))    see some of its keys
    blocks of queries [ceil(max first / B), floor(min end / B))    see all of them: no mask there

and inside the others a pair is compared by two lookups. A plan of some rows only has the same
form: a key's interval is counted among the queries there are.

Lengths share a compiled graph, which the first two rows make. Heads, head dim, dtype, scale,
whether gradients are needed, plans of whole rows and of some, and rows of at most one block have
graphs of their own. Where torch would compile no more of them it raises; it never falls back to
dense scores. On CPU torch has the forward pass only.

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

from megatron_prefix.attention.backends.requirements import head_dim_fault, why_not_on_cuda
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.errors import RunError
from megatron_prefix.layout import TreeLayout
from megatron_prefix.platform.transfer import on_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_CAPABILITY = (7, 0)
"""Of Triton, which torch compiles it to."""
MAX_GRAPHS = 64
"""Forms of the call that a process may compile; torch's own limit for one function is 8."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_flex(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """What keeps this backend from training on `device` in `dtype`, with the remedy; else None."""
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
    layout: TreeLayout, q_rows: np.ndarray | None = None, kv_rows: np.ndarray | None = None
) -> np.ndarray:
    """int32 [2, S]: key s is seen by the queries from `[0, s]` up to, not including, `[1, s]`.

    Rows are as `TreePlan` takes them. First queries ascend.
    """
    rows = np.arange(layout.num_tokens) if kv_rows is None else kv_rows
    seen = np.stack([rows, layout.token_subtree_ends()[rows]])
    return (seen if q_rows is None else np.searchsorted(q_rows, seen)).astype(np.int32)


def block_ranges(intervals: np.ndarray, num_queries: int, block: int) -> np.ndarray:
    """int32 [4, K]: for each block of keys the blocks of queries `[0] : [1]` that see some of it,
    and `[2] : [3]` that see all of it. Both are empty where start and end are equal.

    A block that the row's end cuts short is never seen as a whole.
    """
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
    q_rows: np.ndarray | None = None,
    kv_rows: np.ndarray | None = None,
    block: int = BLOCK,
) -> BlockMask:
    """torch's `BlockMask` of a layout, or of some queries and keys of it."""
    from torch.nn.attention.flex_attention import BlockMask

    intervals = query_intervals(layout, q_rows, kv_rows)
    num_keys = intervals.shape[1]
    num_queries = layout.num_tokens if q_rows is None else len(q_rows)
    ranges = on_device(block_ranges(intervals, num_queries, block), device)
    first, end = on_device(intervals, device)

    def sees(batch, head, q, k):
        return (first[k] <= q) & (q < end[k])

    q_block = torch.arange(-(-num_queries // block), device=device).unsqueeze(1)
    is_some = (ranges[0] <= q_block) & (q_block < ranges[1])
    is_all = (ranges[2] <= q_block) & (q_block < ranges[3])
    return BlockMask.from_kv_blocks(
        *_listed(is_some & ~is_all),
        *_listed(is_all),
        BLOCK_SIZE=block,
        mask_mod=sees,
        seq_lengths=(num_queries, num_keys),
    )


def plan_block_mask(plan: TreePlan) -> BlockMask:
    """A plan's `BlockMask`, built once."""
    return plan.once("block_mask", lambda p: block_mask(p.layout, p.device, p.q_rows, p.kv_rows))


def _listed(is_set: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, K] -> how many blocks each row has, [1, 1, Q], and which, those first."""
    counts = is_set.sum(1, dtype=torch.int32)
    order = is_set.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """torch's kernel, compiled at the first call of each form; a call that would run it uncompiled
    raises instead."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex_tree_attention(q: Tensor, k: Tensor, v: Tensor, mask, scale: float) -> Tensor:
    """Tree attention under a plan's block mask; arguments as `tree_attention` checks them.

    Raises RunError where this process has compiled `MAX_GRAPHS` forms of the call already.
    """
    if q.size(0) == 0:  # no kernel takes an empty row; keep all three in the graph
        return q + (k.sum() + v.sum())
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    is_grouped = q.size(1) != k.size(1)
    with _graphs_up_to(MAX_GRAPHS):
        out = compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)
    return out.squeeze(0).transpose(0, 1)


@contextlib.contextmanager
def _graphs_up_to(most: int) -> Iterator[None]:
    """Let one function have `most` compiled graphs inside, or more where torch is set to more."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    most = max(most, config.recompile_limit)
    try:
        with config.patch(recompile_limit=most):
            yield
    except FailOnRecompileLimitHit as error:
        raise RunError(
            f"attention_backend flex: this process has compiled {most} forms of the call (heads, "
            "head dim, dtype, scale, with and without gradients, ...) and torch compiles no more; "
            "raise torch._dynamo.config.recompile_limit, call torch._dynamo.reset() between "
            "models, or use attention_backend flash or path"
        ) from error
