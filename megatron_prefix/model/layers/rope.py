"""Rotary angles by position along the root path, not by index in the row.

Siblings have the same positions, so the angles are computed from `position_ids` instead of being
cut from a table in the order of the row. Shapes: T tokens, D rotated channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prefix.config import RopeScaling


def rotary_frequencies(
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Radians per position for each channel pair, float32 [D/2]: base^(-2i/D), scaled.

    `linear` divides all by `factor`. `llama3` (Llama 3.1) divides those that turn fewer than
    `low_freq_factor` times over the original context, keeps those that turn more than
    `high_freq_factor` times, and blends in between.
    """
    # head_dim 4, base 10000: exponents [0, 2] / 4, frequencies [1, 0.01]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / base ** (exponents / head_dim)
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    assert low is not None and high is not None and context is not None, "llama3 has all three"
    # 1 for pairs that turn at least `high` times over the context, 0 below `low`, linear between
    turns = context * frequencies / (2 * math.pi)
    unscaled = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling.factor)


def rotary_angles(
    position_ids_T: Tensor, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> Tensor:
    """Angles in radians, float32 [T, D/2].

    Channels i and i + D/2 rotate by position * base^(-2i/D) (Su et al. 2021, arXiv 2104.09864,
    in the half-split order of Llama), or by scaled frequencies; see attention/rotary.py.
    """
    frequencies = rotary_frequencies(head_dim, base, scaling, position_ids_T.device)
    return torch.outer(position_ids_T.to(torch.float32), frequencies)
