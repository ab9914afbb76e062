"""The lora section: low-rank adapters on a frozen model, under PEFT's names."""

from megatron_prefix.config.lora.rules import lora_faults, lora_size_faults
from megatron_prefix.config.lora.section import (
    FEED_FORWARD_TARGETS,
    LATENT_TARGETS,
    TARGETS,
    LoraConfig,
)

__all__ = [
    "FEED_FORWARD_TARGETS",
    "LATENT_TARGETS",
    "TARGETS",
    "LoraConfig",
    "lora_faults",
    "lora_size_faults",
]
