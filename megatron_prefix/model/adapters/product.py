"""The products of the low-rank factors, beside a linear layer and added to its output.

Megatron-Core fuses layers that are separate in PEFT, so the channels of one adapter are several
spans of the fused output. With two query heads and one key head a group:

    linear_qkv   q0 q1 k0 v0 | q2 q3 k1 v1      2 groups, spans q [0, 2), k [2, 3), v [3, 4)
    linear_fc1   g | u                          1 group, spans gate [0, F), up [F, 2F)

Every span is a strided view, so no adapter's output is ever a tensor of its own. Nor is the
gradient that an adapter gives the layer's input: it is added where the layer has written its own.

    x -> low_products -> x, A x          x -> frozen layer -> W x          W x, A x -> add_products

Shapes: T tokens, C input channels, G groups, W channels of a group, w channels of a span, R rank,
P adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Span = tuple[int, int]
"""First channel of an adapter in each group, and the one after its last."""


def low_products(input_: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The input [T, 1, C] of a layer, of experts [T, C], for the layer itself, and A x [T, 1, P R];
    `factor` are all A of the layer, one under the other [P R, C].

    Only the frozen layer may use the returned input: its gradient's memory is written.
    """
    return _LowProducts.apply(input_, factor)


class _LowProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_, factor):
        ctx.save_for_backward(input_, factor)
        return input_.view_as(input_), F.linear(input_, factor)

    @staticmethod
    def backward(ctx, grad, grad_low):
        input_, factor = ctx.saved_tensors
        low_TR = grad_low.reshape(-1, factor.size(0))
        grad_factor = low_TR.t() @ input_.reshape(-1, factor.size(1))
        if not ctx.needs_input_grad[0]:
            return None, grad_factor
        grad = grad.contiguous()
        grad.view(-1, factor.size(1)).addmm_(low_TR, factor)
        return grad, grad_factor


def add_products(
    output: Tensor,
    low: Tensor,
    factors: Sequence[Tensor],
    spans: Sequence[Span],
    num_groups: int,
) -> Tensor:
    """`output` [T, 1, G W], of experts [T, G W], plus B A x in the span of each adapter.

    `low` [T, 1, P R] are the products A x of the adapters in order, scaled, and `factors` their B
    [G w, R]. `output` must be used nowhere else: its memory is written and returned.
    """
    return _AddProducts.apply(output, low, num_groups, tuple(spans), *factors)


class _AddProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, low, num_groups, spans, *factors):
        ctx.num_groups, ctx.spans = num_groups, spans
        ctx.save_for_backward(low, *factors)
        # Not the tensor itself: it may be a view that another function returned, which autograd
        # does not let anyone write to. Were it saved for a backward pass, that would still fail.
        total = output.detach()
        for rows, low_TR, factor in zip(_spans(total, ctx), _lows(low, ctx), factors, strict=True):
            factor_GwR = factor.view(num_groups, -1, factor.size(1))
            low_GTR = low_TR.expand(num_groups, -1, -1)
            rows.baddbmm_(low_GTR, factor_GwR.transpose(1, 2))
        return total

    @staticmethod
    def backward(ctx, grad):
        low, *factors = ctx.saved_tensors
        grad = grad.contiguous()
        grad_low = torch.empty_like(low)
        grad_factors = []
        for rows, low_TR, into_TR, factor in zip(
            _spans(grad, ctx), _lows(low, ctx), _lows(grad_low, ctx), factors, strict=True
        ):
            factor_GwR = factor.view(ctx.num_groups, -1, factor.size(1))
            torch.sum(rows @ factor_GwR, 0, out=into_TR)
            # [G, R, w], then turned: a product that is few rows high is the faster one, and bmm
            # reads the spans in place, while matmul would copy them.
            low_GRT = low_TR.t().expand(ctx.num_groups, -1, -1)
            grad_factors.append(torch.bmm(low_GRT, rows).transpose(1, 2).reshape(factor.shape))
        return grad, grad_low, None, None, *grad_factors


def _spans(channels: Tensor, ctx) -> list[Tensor]:
    """The spans of [T, 1, G W] as views [G, T, w]."""
    num_groups = ctx.num_groups  # no -1 below: an expert may have no tokens
    shape = channels.size(0), num_groups, channels.size(-1) // num_groups
    grouped = channels.view(shape).transpose(0, 1)
    return [grouped[:, :, start:stop] for start, stop in ctx.spans]


def _lows(low: Tensor, ctx) -> Sequence[Tensor]:
    """[T, 1, P R] as one view [T, R] for each adapter."""
    return low.view(low.size(0), low.size(-1)).chunk(len(ctx.spans), dim=1)
