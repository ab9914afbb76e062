"""silu(gate) * up and its gradient, one launch each; model/layers/swiglu.py defines them.

Rounded where the elementary operations round: silu(gate) before the product.

Shapes: T tokens, F feed-forward channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prefix.kernels.launching import launch

CHANNELS = 1024
"""Channels of one program."""


@triton.jit
def gate_kernel(x_ptr, out_ptr, channels, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    x_ptr += 2 * token * channels
    gate = tl.load(x_ptr + channel, mask=mask, other=0.0)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    up = tl.load(x_ptr + channels + channel, mask=mask, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + token * channels + channel, (silu * up).to(dtype), mask=mask)


@triton.jit
def gate_gradient_kernel(grad_ptr, x_ptr, out_ptr, channels, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    x_ptr += 2 * token * channels
    out_ptr += 2 * token * channels
    gate = tl.load(x_ptr + channel, mask=mask, other=0.0)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    up = tl.load(x_ptr + channels + channel, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + token * channels + channel, mask=mask, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    silu = (gate * share).to(dtype).to(tl.float32)
    inner = (grad * up).to(dtype).to(tl.float32)
    grad_gate = inner * share * (1.0 + gate * (1.0 - share))
    tl.store(out_ptr + channel, grad_gate.to(dtype), mask=mask)
    tl.store(out_ptr + channels + channel, (silu * grad).to(dtype), mask=mask)


def gated(gate_up: Tensor) -> Tensor:
    """[..., 2 F], gate before up-projection, -> [..., F]."""
    x = gate_up.contiguous()
    channels = x.size(-1) // 2
    out = torch.empty(*x.shape[:-1], channels, dtype=x.dtype, device=x.device)
    grid = out.numel() // channels, -(-channels // CHANNELS)
    launch(gate_kernel, grid, x, out, channels, CHANNELS=CHANNELS)
    return out


def gated_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `gate_up` [..., 2 F], given that of `gated`."""
    x, grad = gate_up.contiguous(), grad.contiguous()
    channels = grad.size(-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = grad.numel() // channels, -(-channels // CHANNELS)
    launch(gate_gradient_kernel, grid, grad, x, out, channels, CHANNELS=CHANNELS)
    return out
