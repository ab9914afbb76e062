"""Root-mean-square norm for layers without Transformer Engine.

y = x / rms(x) * w with rms(x)^2 = mean(x^2) + eps (Zhang and Sennrich 2019, arXiv 1910.07467), as
one operation. torch's own is one operation on CUDA, but on CPU a chain of elementary ones, each of
which passes over all tokens. With n = x / rms(x) and g the gradient of y, w gets sum(g n) and x
gets (g w - n mean(g w n)) / rms(x).

Shapes: T tokens, C hidden channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

SEQUENCE_PARALLEL = "sequence_parallel"
"""Mark of a parameter whose gradient Megatron-Core sums over tensor-parallel ranks."""


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight carries Megatron-Core's mark for sequence parallelism, under which
    each rank's gradient covers its own tokens only and must be summed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        setattr(self.weight, SEQUENCE_PARALLEL, config.sequence_parallel)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], computed in float32 at least."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        exact = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(exact)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        # n = normed, 1 / rms(x) = scale; grad_x = (g w - n mean(g w n)) scale
        normed, wide = x.to(scale.dtype) * scale, grad.to(scale.dtype)
        product = wide * normed
        grad_weight = product.flatten(0, -2).sum(0)
        mean = (product @ weight.to(scale.dtype)).div_(x.size(-1)).unsqueeze(-1)
        grad_x = (wide * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
