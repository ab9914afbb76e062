"""Rotary embedding of heads, as one operation that saves only the rotation for backward.

Two channels are rotated together, by the angle of their position:

    y1 = x1 cos - x2 sin        backward rotates the gradient by the negative angle
    y2 = x2 cos + x1 sin

Of D rotated channels, channels i and i + D/2 form a pair, or, interleaved, 2i and 2i + 1. The
channels after the first D are not rotated.

Shapes: T tokens, N heads, H head dim, D rotated channels, at most H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, both [T, 1, D/2], and which channels form a pair."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    query_factor: Tensor | None = None
    """[T, 1, 1]: what queries are multiplied by besides; None: 1."""
    is_fused: bool = False
    """Whether a Triton kernel rotates, in one launch; the elementary operations define it."""

    def turn(self, x_TNH: Tensor) -> Tensor:
        """`rotate` by this rotation."""
        return rotate(x_TNH, self)

    def with_growth(self, position_ids_T: Tensor, growth: float, length: int) -> Rotation:
        """The same, and queries at position p grow by 1 + growth log(1 + floor(p / length)), as
        transformers has it for Ministral 3."""
        passed_T = (position_ids_T // length).to(torch.float32)
        return self._replace(query_factor=(1 + growth * torch.log1p(passed_T))[:, None, None])


def rotation_of(angles_TD2: Tensor, amplitude: float = 1.0, interleaved: bool = False) -> Rotation:
    """The rotation by angles in radians, [T, D/2]; what is rotated is multiplied by `amplitude`."""
    cos, sin = angles_TD2.cos()[:, None], angles_TD2.sin()[:, None]
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return Rotation(cos, sin, interleaved)


def rotate_query(x_TNH: Tensor, rotation: Rotation) -> Tensor:
    """`rotate`, times the factor of queries if there is one."""
    rotated = rotate(x_TNH, rotation)
    if rotation.query_factor is None:
        return rotated
    return rotated * rotation.query_factor.to(rotated.dtype)


def rotate(x_TNH: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head by its token's angles, differentiable; in the dtype of `x_TNH`."""
    cos, sin = (part.to(x_TNH.dtype) for part in rotation[:2])
    return _Rotate.apply(x_TNH, cos, sin, rotation.interleaved, rotation.is_fused)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved, is_fused):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.turn = interleaved, _rotated
        if is_fused:
            from megatron_prefix.kernels import rotated  # needs Triton

            ctx.turn = rotated
        return ctx.turn(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ctx.turn(grad, cos, sin, -1, ctx.interleaved), None, None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int, interleaved: bool) -> Tensor:
    # An angle of 90 degrees turns (1, 0) into (0, 1); with sign -1 it turns (0, 1) back into
    # (1, 0). The two halves of `out` are written in place, so that no third tensor of its size is
    # made.
    out = torch.empty_like(x)
    channels = 2 * cos.size(-1)
    if channels < x.size(-1):
        out[..., channels:] = x[..., channels:]
    (x1, x2), (y1, y2) = (_pairs(part[..., :channels], interleaved) for part in (x, out))
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second channels of all pairs, as views: of [a b c d], [a b] and [c d], or [a c]
    and [b d]."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
