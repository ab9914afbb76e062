"""Rotary embedding of heads, as one operation that saves only the rotation for backward.

Channels i and i + H/2 are rotated together, by the angle of their position:

    y1 = x1 cos - x2 sin        backward rotates the gradient by the negative angle
    y2 = x2 cos + x1 sin

Shapes: T tokens, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each token's angles, both [T, 1, H/2]."""


def rotation_of(angles_TH2: Tensor) -> Rotation:
    """Cosine and sine of angles in radians, [T, H/2]."""
    return angles_TH2.cos()[:, None], angles_TH2.sin()[:, None]


def rotate(x_TNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head by its token's angles, differentiable; in the dtype of `x_TNH`."""
    cos, sin = (part.to(x_TNH.dtype) for part in rotation)
    return _Rotate.apply(x_TNH, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    # An angle of 90 degrees turns (1, 0) into (0, 1); with sign -1 it turns (0, 1) back into
    # (1, 0). The two halves of `out` are written in place, so that no third tensor of its size is
    # made.
    out = torch.empty_like(x)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return out
