"""Layer specs: Megatron-Core's layers with tree attention."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_prefix.attention import TreeCoreAttention
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.config.parts import Architecture
from megatron_prefix.model.adapters import with_adapters
from megatron_prefix.model.layers import (
    FamilyLayer,
    SwiGLU,
    norm_class,
    with_latent_attention,
    with_tree_router,
)
from megatron_prefix.platform import submodules_of


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: it is installed, and CUDA is available."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(parts: Architecture) -> bool:
    """Whether a model's layers are Transformer Engine's: they have Llama's parts only."""
    return parts.is_plain and has_transformer_engine()


def tree_layer_spec(
    config: TransformerConfig, backend: str = "auto", layer: int | None = None
) -> ModuleSpec:
    """One transformer layer whose attention follows the tree in `packed_seq_params`; `layer` is its
    index in the whole model, if layers differ in kind.

    Its other parts are Transformer Engine's if it is installed and has them, else Megatron-Core's
    local ones. `config` has the settings of query-key norms, experts and `architecture`;
    `backend` is one of attention.backends.BACKENDS, or `auto`.
    """
    parts: Architecture = getattr(config, "architecture", Architecture())
    experts = config.num_moe_experts
    if layer is not None and layer < parts.dense_layers:
        experts = None
    if uses_transformer_engine(parts):
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=experts,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
        )
        before = IdentityOp if parts.norms == "after" else norm_class(parts)
        spec.submodules.input_layernorm = before
        spec.submodules.pre_mlp_layernorm = IdentityOp if parts.parallel_layers else before
        if config.use_te_activation_func:
            submodules_of(spec.submodules.mlp).activation_func = SwiGLU
        if config.qk_layernorm:
            of_heads = norm_class(Architecture())  # also in families with layer norms
            spec.submodules.self_attention.submodules.q_layernorm = of_heads
            spec.submodules.self_attention.submodules.k_layernorm = of_heads
    attention = ModuleSpec(
        module=TreeCoreAttention, params={"backend": backend, "rotary": parts.rotary}
    )
    if parts.latent is None:
        spec.submodules.self_attention.submodules.core_attention = attention
    else:
        spec = with_latent_attention(spec, attention)
    if not parts.is_plain:
        spec.module = FamilyLayer
    if experts is None:
        return spec
    # Checkpoints use Transformer Engine's names, and it does not fuse this norm before experts.
    spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return with_tree_router(spec, parts.expert_bias)


def tree_block_spec(
    config: TransformerConfig, backend: str = "auto", vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and virtual chunk, with the norm after the last one."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    indices = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    parts: Architecture = getattr(config, "architecture", Architecture())
    on_engine = uses_transformer_engine(parts)
    layers = [tree_layer_spec(config, backend, index) for index in indices]
    lora: LoraConfig | None = getattr(config, "lora", None)
    if lora is not None:
        for index, layer in zip(indices, layers, strict=True):
            if lora.adapts_layer(index):
                with_adapters(layer, lora, on_engine)
    if on_engine:
        from megatron.core.extensions.transformer_engine import TENorm as norm
    else:
        norm = norm_class(parts)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
