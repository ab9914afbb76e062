"""Rotary embedding in one launch; attention/rotary.py defines it.

Every product and sum is rounded where the elementary operations round it. So in bfloat16 the result
has the same bits: a product of two bfloat16 numbers is exact in float32.

Shapes: T tokens, N heads, H head dim, D rotated channels, at most H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prefix.kernels.launching import launch, power_of_two

HEADS = 4
"""Heads of one program."""


@triton.jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride_token,
    stride_head,
    num_heads,
    head_dim,
    pairs,
    sign,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    is_pair = (head < num_heads) & (pair < pairs)
    x_ptr += token * stride_token
    out_ptr += token * num_heads * head_dim
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + pairs
    x1 = tl.load(x_ptr + head * stride_head + first, mask=is_pair, other=0.0)
    x2 = tl.load(x_ptr + head * stride_head + second, mask=is_pair, other=0.0)
    dtype = x1.dtype
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    own = token * pairs + pair
    cos = tl.load(cos_ptr + own, mask=pair < pairs, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + own, mask=pair < pairs, other=0.0).to(tl.float32) * sign
    y1 = (x1 * cos).to(dtype).to(tl.float32) - x2 * sin
    y2 = (x2 * cos).to(dtype).to(tl.float32) + x1 * sin
    tl.store(out_ptr + head * head_dim + first, y1.to(dtype), mask=is_pair)
    tl.store(out_ptr + head * head_dim + second, y2.to(dtype), mask=is_pair)
    if REST > 0:  # channels that are not rotated
        channel = 2 * pairs + tl.arange(0, REST)[None, :]
        is_rest = (head < num_heads) & (channel < head_dim)
        rest = tl.load(x_ptr + head * stride_head + channel, mask=is_rest)
        tl.store(out_ptr + head * head_dim + channel, rest, mask=is_rest)


def rotated(x_TNH: Tensor, cos: Tensor, sin: Tensor, sign: int, interleaved: bool) -> Tensor:
    """A new contiguous tensor: every head of `x_TNH` turned by its token's angles, or back with
    sign -1. `cos` and `sin` have the dtype of `x_TNH` and D/2 entries for each token."""
    x = x_TNH if x_TNH.stride(-1) == 1 else x_TNH.contiguous()
    tokens, heads, head_dim = x.shape
    pairs = cos.size(-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rest = head_dim - 2 * pairs
    launch(
        rotary_kernel,
        (tokens, -(-heads // HEADS)),
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        x.stride(0),
        x.stride(1),
        heads,
        head_dim,
        pairs,
        sign,
        INTERLEAVED=interleaved,
        HEADS=HEADS,
        PAIRS=power_of_two(pairs),
        REST=power_of_two(rest) if rest else 0,
    )
    return out
