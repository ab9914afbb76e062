"""Switches for one kernel in place of several operations, and what they do not go with."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prefix.config.model import ModelConfig

COPYING_BACKENDS = ("auto", "flash", "te")
"""Backends of attention that copy keys."""


def fusion_faults(model: ModelConfig) -> Iterator[str]:
    """Switches that would have no effect."""
    if model.cross_entropy_loss_fusion and model.kind == "reward":
        yield (
            "model.cross_entropy_loss_fusion = True is for a softmax over the vocabulary, and "
            "model.kind: reward has none: remove it"
        )
    if model.key_sum_fusion and model.attention_backend not in COPYING_BACKENDS:
        yield (
            f"model.key_sum_fusion = True has no effect with model.attention_backend: "
            f"{model.attention_backend}, which copies no keys: remove it, or choose flash or te"
        )
