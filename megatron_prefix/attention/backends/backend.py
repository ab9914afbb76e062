"""The record that each backend of tree attention offers, and its import by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.attention.plan import TreePlan

BACKENDS = ("dense", "path", "flash", "te", "flex")
"""Module names of this package; each module has a record `BACKEND`."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of tree attention."""

    why_not: Callable[[torch.device, torch.dtype, int | None], str | None]
    """What prevents its use on a device, in a dtype and for a head dim (None if it is not known),
    with the remedy; None if nothing does."""
    prepare: Callable[[TreePlan], object]
    """Builds what `attend` reads of a plan. Further calls do nothing."""
    attend: Callable[[Tensor, Tensor, Tensor, TreePlan, float], Tensor]
    """`attend(q, k, v, plan, scale)`, with arguments as `tree_attention` checks them."""


def runs_anywhere(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """The `why_not` of a backend without requirements."""
    return None


def load_backend(name: str) -> Backend:
    """Import a backend's module and return its record. `name` is one of BACKENDS."""
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; use one of {', '.join(BACKENDS)}")
    return importlib.import_module(f"megatron_prefix.attention.backends.{name}").BACKEND
