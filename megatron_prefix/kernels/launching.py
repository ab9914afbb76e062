"""Launches of Triton kernels, and what they need."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def why_no_kernels(device: torch.device | str) -> str | None:
    """What prevents Triton kernels on `device`, with the remedy; else None. Imports nothing."""
    if torch.device(device).type != "cuda":
        return f"Triton kernels run on CUDA, not on {torch.device(device).type}: leave it out"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`, or leave it out"
    return None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel` in `grid` programs; an empty grid runs none, which CUDA refuses."""
    if all(grid):
        kernel[grid](*args, **constants)


def power_of_two(number: int) -> int:
    """The least power of 2 that is not below `number`: 5 -> 8."""
    return 1 << max(number - 1, 0).bit_length()
