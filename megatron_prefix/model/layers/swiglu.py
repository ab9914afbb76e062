"""The gate of a gated feed-forward layer, as one operation that saves only its input.

y = silu(gate) * up (Shazeer 2020, arXiv 2002.05202) on the two halves of the first linear layer's
output; for layers without Transformer Engine and without experts.

Shapes: T tokens, F feed-forward channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SwiGLU(MegatronModule):
    """[T, 1, 2 F], gate before up-projection, -> [T, 1, F]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if not config.gated_linear_unit or config.activation_func is not F.silu:
            raise ValueError(
                f"gated_linear_unit = {config.gated_linear_unit}, activation_func = "
                f"{config.activation_func}: SwiGLU needs True and F.silu"
            )
        self.function = _FusedSwiGLU if "gate" in getattr(config, "kernels", ()) else _SwiGLU

    def forward(self, gate_up: Tensor) -> Tensor:
        return self.function.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        # both halves are written into one tensor, so that they need no concatenation:
        # d/d gate = silu'(gate) up, d/d up = silu(gate)
        grads = torch.empty_like(gate_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grads


class _FusedSwiGLU(torch.autograd.Function):
    """The same in one launch forward and one backward."""

    @staticmethod
    def forward(ctx, gate_up):
        from megatron_prefix.kernels import gated  # needs Triton

        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    def backward(ctx, grad):
        from megatron_prefix.kernels import gated_gradient

        return gated_gradient(grad, *ctx.saved_tensors)
