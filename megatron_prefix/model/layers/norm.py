"""Norms for layers without Transformer Engine.

y = x / rms(x) * w with rms(x)^2 = mean(x^2) + eps (Zhang and Sennrich 2019, arXiv 1910.07467), as
one operation. torch's own is one operation on CUDA, but on CPU a chain of elementary ones, each of
which passes over all tokens. With n = x / rms(x) and g the gradient of y, w gets sum(g n) and x
gets (g w - n mean(g w n)) / rms(x). With `norm_adds_one` w is 1 + weight.

`WideNorm` is the same over all heads of a token, which tensor-parallel ranks share: the two means
are sums over the ranks. `LayerNorm` subtracts the mean first (Ba et al. 2016, arXiv 1607.06450).

Shapes: T tokens, N heads, H head dim, C hidden channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
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
        self.adds_one = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], computed in float32 at least."""
        weight: Tensor = self.weight
        if self.adds_one:
            weight = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
        if x.is_cuda and not self.adds_one:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps, None)


class _HeadNorm(torch.nn.Module):
    """A norm of the heads of a token, of which this rank of `group` has some.

    The weight is divided like the heads, and each rank computes the whole gradient of its part.
    """

    def __init__(
        self, shape: tuple[int, ...], eps: float, group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(shape))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.eps, self.group = eps, group

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The weight as a part of a whole that is divided along its first dimension."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class WideNorm(_HeadNorm):
    """RMSNorm over all heads of a token at once; `num_heads` of them are this rank's."""

    def __init__(
        self, num_heads: int, head_dim: int, eps: float, group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__((num_heads * head_dim,), eps, group)

    def forward(self, x_T1NH: Tensor) -> Tensor:
        """[T, 1, N, H] -> the same shape, computed in float32 at least."""
        return _RMSNorm.apply(x_T1NH.flatten(-2), self.weight, self.eps, self.group).view_as(x_T1NH)


class NormByHead(_HeadNorm):
    """Layer norm without bias over each head, which has its own weight [H]."""

    def __init__(
        self, num_heads: int, head_dim: int, eps: float, group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__((num_heads, head_dim), eps, group)

    def forward(self, x_T1NH: Tensor) -> Tensor:
        """[T, 1, N, H] -> the same shape, computed in float32 at least."""
        dtype = torch.promote_types(x_T1NH.dtype, torch.float32)
        normed = F.layer_norm(x_T1NH.to(dtype), x_T1NH.shape[-1:], None, None, self.eps)
        return (normed * self.weight.to(dtype)).to(x_T1NH.dtype)


class LayerNorm(torch.nn.Module):
    """Layer norm with `norm_bias` as the model has it, marked like `RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        bias = torch.nn.Parameter(torch.zeros(hidden_size))
        has_bias = getattr(config, "architecture").norm_bias  # noqa: B009
        self.bias = bias if has_bias else None
        for parameter in self.parameters():
            setattr(parameter, SEQUENCE_PARALLEL, config.sequence_parallel)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], computed in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = self.weight.to(dtype)
        return F.layer_norm(x.to(dtype), weight.shape, weight, bias, self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, group):
        exact = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(exact)
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        ctx.channels = x.size(-1)
        ctx.group = group if group is not None and group.size() > 1 else None
        if ctx.group is not None:
            ctx.channels *= ctx.group.size()
            torch.distributed.all_reduce(squares, group=ctx.group)
        scale = squares.div_(ctx.channels).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        # n = normed, 1 / rms(x) = scale; grad_x = (g w - n mean(g w n)) scale
        normed, wide = x.to(scale.dtype) * scale, grad.to(scale.dtype)
        product = wide * normed
        grad_weight = product.flatten(0, -2).sum(0)
        total = product @ weight.to(scale.dtype)
        if ctx.group is not None:
            torch.distributed.all_reduce(total, group=ctx.group)
        mean = total.div_(ctx.channels).unsqueeze(-1)
        grad_x = (wide * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None
