"""Rotary angles by position along the root path, not by index in the row.

Siblings have the same positions, so the angles are computed from `position_ids` instead of being
cut from a table in the order of the row. Shapes: T tokens, D rotated channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.config import RopeScaling
from megatron_prefix.platform import on_device


def rotary_frequencies(
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Radians per position for each channel pair, float32 [D/2]: base^(-2i/D), scaled.

    `linear` divides all by `factor`. `llama3` (Llama 3.1) divides those that turn fewer than
    `low_freq_factor` times over the original context, keeps those that turn more than
    `high_freq_factor` times, and blends in between. `yarn` (Peng et al. 2023, arXiv 2309.00071)
    does the same between `beta_slow` and `beta_fast`, linear in the channel. `longrope` (Ding et
    al. 2024, arXiv 2402.13753) divides each by its `short_factor`, and `dynamic` none: both hold
    up to the original context.
    """
    # head_dim 4, base 10000: exponents [0, 2] / 4, frequencies [1, 0.01]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / base ** (exponents / head_dim)
    if scaling is None or scaling.type == "dynamic":
        return frequencies
    if scaling.type == "longrope":
        assert scaling.short_factor is not None
        return frequencies / on_device(np.array(scaling.short_factor, np.float32), device or "cpu")
    assert scaling.factor is not None
    if scaling.type == "linear":
        return frequencies / scaling.factor
    if scaling.type == "yarn":
        unscaled = _yarn_kept(head_dim, base, scaling, exponents)
    else:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        context = scaling.original_max_position_embeddings
        assert low is not None and high is not None and context is not None, "llama3 has all three"
        # 1 for pairs that turn at least `high` times over the context, 0 below `low`, linear
        # between
        turns = context * frequencies / (2 * math.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling.factor)


def _yarn_kept(head_dim: int, base: float, scaling: RopeScaling, exponents: Tensor) -> Tensor:
    """1 for pairs of channels that keep their frequency, 0 for those that are divided, [D/2].

    Pair i turns t = L / (2 pi base^(2i/D)) times over L tokens, so the pair with t turns is
    i = D log(L / (2 pi t)) / (2 log base). From that of `beta_fast` to that of `beta_slow` the
    result falls from 1 to 0.
    """
    context = scaling.original_max_position_embeddings
    assert context is not None

    def pair_with(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_with(scaling.beta_fast or 32), pair_with(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    return 1 - ((exponents / 2 - first) / (last - first)).clamp(0, 1)


def rotary_angles(
    position_ids: Tensor,
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    sections: Sequence[int] | None = None,
) -> Tensor:
    """Angles in radians, float32 [T, D/2].

    Channels i and i + D/2 rotate by position * base^(-2i/D) (Su et al. 2021, arXiv 2104.09864,
    in the half-split order of Llama), or by scaled frequencies; see attention/rotary.py. With
    positions [3, T] the pairs of channels take one axis after another, so many as `sections` say:
    sections [1, 2] of three pairs rotate by the axes [0, 1, 1].
    """
    frequencies = rotary_frequencies(head_dim, base, scaling, position_ids.device)
    positions = position_ids.to(torch.float32)
    if positions.dim() == 1:
        return torch.outer(positions, frequencies)
    assert sections is not None, "three axes, and nothing says which channels take which"
    parts = frequencies.split([*sections])
    return torch.cat([torch.outer(positions[i % 3], part) for i, part in enumerate(parts)], dim=1)
