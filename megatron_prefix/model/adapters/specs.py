"""Layer specs with adapted linear layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.model.adapters.latent import with_latent_adapters
from megatron_prefix.model.adapters.linear import (
    DownLinear,
    GateUpLinear,
    OutputLinear,
    QKVLinear,
)
from megatron_prefix.platform import submodules_of

INPUT_NORM = "input_layernorm."
UNFUSED_NORMS = {
    INPUT_NORM: "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Norms before a linear layer, and their names in checkpoints, in which they belong to it."""


class AdaptedLayers(NamedTuple):
    """One implementation of the adapted linear layers of a transformer layer."""

    qkv: type[torch.nn.Module]
    output: type[torch.nn.Module]
    gate_up: type[torch.nn.Module]
    down: type[torch.nn.Module]
    norm: type[torch.nn.Module] | None = None
    """The norm before them, if the layers that they replace compute it inside."""


def _local_layers() -> AdaptedLayers:
    """Megatron-Core's own."""
    return AdaptedLayers(QKVLinear, OutputLinear, GateUpLinear, DownLinear)


def _transformer_engine_layers() -> AdaptedLayers:
    """Transformer Engine's; it must be installed."""
    from megatron.core.extensions.transformer_engine import TENorm

    from megatron_prefix.model.adapters import te_linear as te

    return AdaptedLayers(
        te.TEQKVLinear, te.TEOutputLinear, te.TEGateUpLinear, te.TEDownLinear, TENorm
    )


def with_adapters(layer: ModuleSpec, lora: LoraConfig, has_transformer_engine: bool) -> ModuleSpec:
    """Replace the linear layers of a layer spec that `lora` names; changes and returns `layer`.

    `has_transformer_engine` says which layers the spec has. The spec of a mixture must have one
    module for each expert, if its experts are adapted.
    """
    kinds = _transformer_engine_layers() if has_transformer_engine else _local_layers()
    targets, parts = set(lora.target_modules or ()), layer.submodules
    attention = submodules_of(parts.self_attention)
    if hasattr(attention, "linear_kv_down_proj"):
        with_latent_adapters(attention, targets)
    elif targets & set(kinds.qkv.targets):  # type: ignore[attr-defined]
        attention.linear_qkv = kinds.qkv
        parts.input_layernorm = kinds.norm or parts.input_layernorm
    if "o_proj" in targets:
        attention.linear_proj = kinds.output
    feed_forward = submodules_of(parts.mlp)
    has_experts = hasattr(feed_forward, "experts")
    mlp = submodules_of(feed_forward.experts) if has_experts else feed_forward
    if targets & set(kinds.gate_up.targets):  # type: ignore[attr-defined]
        mlp.linear_fc1 = kinds.gate_up
        if not has_experts:
            parts.pre_mlp_layernorm = kinds.norm or parts.pre_mlp_layernorm
    if "down_proj" in targets:
        mlp.linear_fc2 = kinds.down
    if kinds.norm is not None:
        names = {k: x for k, x in UNFUSED_NORMS.items() if k == INPUT_NORM or not has_experts}
        parts.sharded_state_dict_keys_map = {**(parts.sharded_state_dict_keys_map or {}), **names}
    return layer
