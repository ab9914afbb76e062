"""Sums over the copies of every key in one launch; PathPlan.sum_copies defines them.

Copies [a b c d e] with order [0 3 | 1 | 2 4] and offsets [0 2 3 5] have the sums a + d, b, c + e.
Each sum is in float32 and in this order, so it has the same bits every time, and those of
torch.segment_reduce.

Shapes: S segments, S_kv copies, C channels of a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prefix.kernels.launching import launch

CHANNELS = 512
"""Channels of one program."""


@triton.jit
def segments_kernel(
    copies_ptr, order_ptr, offsets_ptr, out_ptr, stride, channels, CHANNELS: tl.constexpr
):
    segment = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    total = tl.zeros([CHANNELS], tl.float32)
    start, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    for i in range(start, end):
        copy = tl.load(order_ptr + i)
        row = tl.load(copies_ptr + copy * stride + channel, mask=mask, other=0.0)
        total += row.to(tl.float32)
    tl.store(out_ptr + segment * channels + channel, total.to(out_ptr.dtype.element_ty), mask=mask)


def segment_sums(copies: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """[S_kv, ...] -> [S, ...]: segment s is the sum of the copies
    `order[offsets[s] : offsets[s + 1]]`, in float32; returned in the dtype of `copies`."""
    flat = copies.flatten(1)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    segments, channels = len(offsets) - 1, flat.size(1)
    out = torch.empty(segments, *copies.shape[1:], dtype=copies.dtype, device=copies.device)
    grid = segments, -(-channels // CHANNELS)
    stride = flat.stride(0)
    launch(segments_kernel, grid, flat, order, offsets, out, stride, channels, CHANNELS=CHANNELS)
    return out
