"""Rotary angles by position along the root path, not by row index.

Siblings repeat positions, so the angles are computed from `position_ids` instead of being cut
from a table in row order. Shapes: T tokens, D rotated channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(position_ids_T: Tensor, head_dim: int, base: float) -> Tensor:
    """Angles in radians for Megatron-Core's unfused rotary embedding, float32 [T, 1, 1, D].

    Channel i and i + D/2 turn by position * base^(-2i/D) (Su et al. 2021, arXiv 2104.09864,
    in the half-split order of Llama).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_T.device)
    frequencies = 1.0 / base ** (exponents / head_dim)
    angles = torch.outer(position_ids_T.to(torch.float32), frequencies)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
