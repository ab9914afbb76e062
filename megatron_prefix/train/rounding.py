"""How far two ways to compute the same step may be apart: the budgets of all checks of a run."""

from __future__ import annotations

from megatron_prefix.model import TreeTransformerConfig

ROUNDING = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "fp8": 2.0**-4}
"""Relative rounding of one operation and of what it is summed with, by `model.dtype`, or of FP8
(e4m3)."""
EXPERTS = 4.0
"""In bfloat16, what rounding is multiplied by for a model with experts: two that a router finds
almost equal may change places, which moves a token by more than rounding."""
TOLERANCE = 1e-5
"""Of a log-probability in nats, of a reward and of a loss, beside rounding."""
DEVIATIONS = 8.0
"""Roundings add as a random walk, of which a value may be this many times the expected size off.
Seen: up to 4.3 times, over random and trained models in both precisions."""
BEND = 2.0
"""What a first-order bound is multiplied by, because losses and gradients are not straight."""


def rounding_of(config: TreeTransformerConfig) -> float:
    """Relative rounding of a model."""
    if not config.bf16:
        return ROUNDING["float32"]
    rounding = ROUNDING["fp8" if config.fp8 else "bfloat16"]
    return rounding * (EXPERTS if config.num_moe_experts else 1.0)
