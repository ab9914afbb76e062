"""FlexAttention: torch's compiled attention, told which blocks of the row see one another.

No keys are gathered. Each key is seen by one interval of the queries, those from its own row to
the end of its subtree, so a mask of blocks follows from the intervals' ends without looking at a
pair of tokens. For blocks of B tokens, with `first` and `end` of the intervals of a block of keys,

    blocks of queries [floor(min first / B), ceil(max end / B))    see some of its keys
    blocks of queries [ceil(max first / B), floor(min end / B))    see all of them: no mask there

and inside the others a pair is compared by two lookups. A plan of some rows only has the same
form: a key's interval is counted among the queries there are.

Compiled once for all lengths. On CPU torch has the forward pass only.

Shapes: L queries, S keys, N query heads, G key/value heads, H head dim; Q and K blocks of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.layout import TreeLayout

BLOCK = 128
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_flex(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """What keeps this backend from training on `device` in `dtype`, with the remedy; else None."""
    if device.type == "cpu":
        return "on CPU FlexAttention has no backward pass; use attention_backend path or auto"
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}; use attention_backend path or auto"
    if dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16, not in {dtype}; use path"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check the driver, or use attention_backend path on CPU"
    if head_dim is not None and not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return (
            f"it needs a head dim of {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}; use "
            "attention_backend path"
        )
    return None


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
):
    """torch's `BlockMask` of a layout, or of some queries and keys of it."""
    from torch.nn.attention.flex_attention import BlockMask

    intervals = query_intervals(layout, q_rows, kv_rows)
    num_keys = intervals.shape[1]
    num_queries = layout.num_tokens if q_rows is None else len(q_rows)
    ranges = torch.from_numpy(block_ranges(intervals, num_queries, block)).to(device)
    first, end = torch.from_numpy(intervals).to(device)

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


def _listed(is_set: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, K] -> how many blocks each row has, [1, 1, Q], and which, those first."""
    counts = is_set.sum(1, dtype=torch.int32)
    order = is_set.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """torch's kernel, compiled at its first call for lengths of any size."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_tree_attention(q: Tensor, k: Tensor, v: Tensor, mask, scale: float) -> Tensor:
    """Tree attention under a plan's block mask; arguments as `tree_attention` checks them."""
    if q.size(0) == 0:  # no kernel takes an empty row; keep all three in the graph
        return q + (k.sum() + v.sum())
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    is_grouped = q.size(1) != k.size(1)
    out = compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)
    return out.squeeze(0).transpose(0, 1)
