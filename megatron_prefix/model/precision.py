"""FP8: Megatron-Core's settings for it, and whether it can run here."""

from __future__ import annotations

from typing import Any

import torch

from megatron_prefix.config import ModelConfig
from megatron_prefix.config.fp8 import CAPABILITIES
from megatron_prefix.config.parts import Architecture
from megatron_prefix.errors import InputError
from megatron_prefix.model.spec import has_transformer_engine, uses_transformer_engine

AMAX_HISTORY = 1024
"""Rows whose largest value a delayed scale follows; Transformer Engine's own default."""


def fp8_settings(model: ModelConfig, parts: Architecture) -> dict[str, Any]:
    """Those of `TransformerConfig`; none without `model.fp8`. Raises InputError if the layers
    cannot compute in FP8 here."""
    recipe = model.recipe
    if recipe is None:
        return {}
    setting = f"model.fp8 = {model.fp8}"
    if not torch.cuda.is_available():
        raise InputError(f"{setting} runs on CUDA, and there is no such device: remove it")
    if not has_transformer_engine():
        raise InputError(
            f"{setting} needs Transformer Engine's layers: install 'transformer-engine[pytorch]', "
            "or remove it"
        )
    if not uses_transformer_engine(parts):
        raise InputError(
            f"{setting}: this model has parts that Transformer Engine's layers do not have: remove "
            "it"
        )
    available, needed = torch.cuda.get_device_capability(), CAPABILITIES[recipe]
    if available < needed:
        raise InputError(
            f"model.fp8_recipe = {recipe} needs compute capability {needed[0]}.{needed[1]}, and "
            f"this device has {available[0]}.{available[1]}: choose another recipe, or remove "
            "model.fp8"
        )
    return dict(
        fp8=model.fp8,
        fp8_recipe=recipe,
        first_last_layers_bf16=model.first_last_layers_bf16,
        # of delayed scales: rows differ, and what is above the largest value is cut off
        fp8_amax_history_len=AMAX_HISTORY,
        fp8_amax_compute_algo="max",
    )
