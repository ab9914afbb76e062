"""Log-softmax over the vocabulary without a float32 copy of the logits; model/logps.py defines it.

Forward reads the logits once and keeps two numbers of each row: the maximum, and the sum of
exp(logit - maximum). Backward computes the probabilities again and writes the gradient, in the
dtype of the logits. The vocabulary may be divided over ranks: the caller joins their numbers.

Shapes: U rows of logits, V vocabulary (local), N targets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prefix.kernels.launching import launch

COLUMNS = 4096
"""Columns that one program reads at a time."""
WARPS = 8


@triton.jit
def statistics_kernel(x_ptr, top_ptr, sum_ptr, stride, columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    x_ptr += row * stride
    # of every lane: its maximum so far, and its sum relative to that
    top = tl.full([COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        mask = start + column < columns
        x = tl.load(x_ptr + start + column, mask=mask, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # a lane that has seen no column stays at -inf, and -inf - -inf is not a number
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    row_top = tl.max(top, 0)
    safe = tl.where(row_top == -float("inf"), 0.0, row_top)
    tl.store(top_ptr + row, row_top)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp(top - safe), 0))


@triton.jit
def gradient_kernel(
    x_ptr,
    top_ptr,
    sum_ptr,
    weight_ptr,
    offsets_ptr,
    target_ptr,
    grad_ptr,
    out_ptr,
    stride,
    columns,
    width,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * stride + column, mask=column < columns, other=-float("inf"))
    top, total = tl.load(top_ptr + row), tl.load(sum_ptr + row)
    grad = tl.exp(x.to(tl.float32) - top) / total * -tl.load(weight_ptr + row)
    start, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    for i in range(start, end):
        grad += tl.where(column == tl.load(target_ptr + i), tl.load(grad_ptr + i), 0.0)
    tl.store(out_ptr + row * width + column, grad.to(out_ptr.dtype.element_ty), mask=column < width)


def row_statistics(logits_UV: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(logit - maximum) over the first `columns` columns, float32 [U] both;
    -inf and 0 without columns."""
    x = logits_UV if logits_UV.stride(-1) == 1 else logits_UV.contiguous()
    top, total = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    launch(
        statistics_kernel,
        (len(x),),
        x,
        top,
        total,
        x.stride(0),
        columns,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return top, total


def softmax_gradient(
    logits_UV: Tensor,
    columns: int,
    top_U: Tensor,
    sum_U: Tensor,
    weight_U: Tensor,
    offsets: Tensor,
    target_N: Tensor,
    grad_N: Tensor,
) -> Tensor:
    """grad_N at each target, minus weight_U exp(logit - top_U) / sum_U; 0 from `columns` on.

    Row u has the targets `offsets[u]` up to, not including, `offsets[u + 1]`; a target that is not
    among this rank's columns is negative. Summed in float32, returned in the dtype of the logits.
    """
    x = logits_UV if logits_UV.stride(-1) == 1 else logits_UV.contiguous()
    width = x.size(1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        gradient_kernel,
        (len(x), -(-width // COLUMNS)),
        x,
        top_U,
        sum_U,
        weight_U,
        offsets,
        target_N,
        grad_N,
        out,
        x.stride(0),
        columns,
        width,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out
