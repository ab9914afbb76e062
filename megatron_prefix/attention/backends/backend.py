"""The record that each backend of tree attention offers, and its import by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prefix.attention.plan import TreePlan

BACKENDS = ("dense", "path", "flash", "te", "flex")
"""Module names of this package; each module has a record `BACKEND`."""


FEATURES = ("window", "softcap", "sinks")
"""What attention may need beyond plain softmax over root paths."""


class Scoring(NamedTuple):
    """How scores become weights: `softmax` over keys of `softcap(scale * q k)`.

    A soft cap c maps a score s to c tanh(s / c). A sink is one more score in the denominator of
    the softmax, without a value. The sliding window is the plan's.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    """[N]: one sink per query head, or none."""
    fuses_sums: bool = False
    """Whether a Triton kernel sums the gradients of copied keys; for backends that copy them."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of tree attention."""

    why_not: Callable[[torch.device, torch.dtype, int | None], str | None]
    """What prevents its use on a device, in a dtype and for a head dim (None if it is not known),
    with the remedy; None if nothing does."""
    prepare: Callable[[TreePlan], object]
    """Builds what `attend` reads of a plan. Further calls do nothing."""
    attend: Callable[[Tensor, Tensor, Tensor, TreePlan, Scoring], Tensor]
    """`attend(q, k, v, plan, scoring)`, with arguments as `tree_attention` checks them."""
    copies_keys: bool = False
    """Whether it copies keys of shared tokens, so that it sums gradients of copies."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """The FEATURES that it does not compute, each with the remedy."""
    refuses: Mapping[str, Callable[[], str | None]] = field(default_factory=dict)
    """FEATURES that need more than `why_not` asks for: what prevents one on this machine, with the
    remedy, or None."""

    def obstacle(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int | None,
        features: Collection[str] = (),
    ) -> str | None:
        """The first of `features` that this backend lacks, `why_not`, or the first of them that it
        refuses here; each with the remedy."""
        asked = [x for x in FEATURES if x in features]
        missing = next((self.lacks[x] for x in asked if x in self.lacks), None)
        if obstacle := missing or self.why_not(device, dtype, head_dim):
            return obstacle
        refused = (self.refuses[x]() for x in asked if x in self.refuses)
        return next((reason for reason in refused if reason), None)


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
