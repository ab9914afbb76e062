"""Sinks applied after a kernel, exactly, from its log-sum-exp.

A sink b of a head is one more score in the softmax, without a value. With the kernel's output O and
log-sum-exp L of a query, the denominator e^L becomes e^L + e^b:

    L' = log(e^L + e^b)        O' = O e^(L - L') = O sigmoid(L - b)

The backward pass of FlashAttention (arXiv 2307.08691) computes its weights as e^(S - L) and their
mean gradient as dO . O. Called with L' and O' it gives the exact gradients of q, k and v, because
the sink's value is 0. The sink's own weight is e^(b - L'), so its gradient is the sum over queries

    db = - sum e^(b - L') (dO . O')

Shapes: L queries, N query heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """O' [L, N, H] in the dtype of `out`, and L' [L, N], of `out` [L, N, H], `lse` [L, N] and
    `sinks` [N]."""
    sinks = sinks.to(lse.dtype)
    share = torch.sigmoid(lse - sinks).unsqueeze(-1)
    return (out * share).to(out.dtype), torch.logaddexp(lse, sinks)


def sink_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """[N] in the dtype of `sinks`; `out` and `lse` are those of `add_sinks`."""
    mean_grad = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    weights = torch.exp(sinks.to(lse.dtype) - lse)
    return -(weights * mean_grad).sum(0).to(sinks.dtype)
