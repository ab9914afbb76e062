"""What is trained of a model with adapters: their factors, whole copies, a reward model's head.

Everything else is the frozen base. Parameters are told apart by name, canonical or a rank's own.
"""

from __future__ import annotations

import torch

from megatron_prefix.model.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    REWARD_HEAD,
    SAVED_EMBEDDING,
    SAVED_OUTPUT_LAYER,
    is_added,
)

ORIGINALS = {SAVED_EMBEDDING: EMBEDDING, SAVED_OUTPUT_LAYER: OUTPUT_LAYER}
"""Whole copies that are trained, and the frozen matrices that they start from."""


def is_trained(name: str) -> bool:
    """Whether a parameter of a model with adapters is trained."""
    return is_added(name) or name == REWARD_HEAD


def freeze_base(model: torch.nn.Module) -> None:
    """Let only what `is_trained` have gradients, optimizer state and gradient buffers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))


@torch.no_grad()
def start_saved_modules(model: torch.nn.Module) -> None:
    """Set the whole copies of `lora.modules_to_save` to their frozen originals."""
    parameters = dict(model.named_parameters())
    for copy, original in ORIGINALS.items():
        if copy in parameters:
            parameters[copy].copy_(parameters[original])
