"""The linear layers and norms of a layer of a model: which there are, and their shapes.

Names are canonical (model/names.py), without `.weight` and `.bias`.
"""

from __future__ import annotations

from megatron_prefix.config import ModelSizes
from megatron_prefix.model.hf.names import (
    ATTENTION_NORM,
    CORRECTION,
    EXPERT_FC1,
    EXPERT_FC2,
    FC1,
    FC2,
    INPUT_NORM,
    K_NORM,
    KV_DOWN,
    KV_NORM,
    KV_UP,
    MLP_NORM,
    PRE_MLP_NORM,
    PROJ,
    Q_DOWN,
    Q_NORM,
    Q_PROJ,
    Q_UP,
    QKV,
    ROUTER,
    SHARED_FC1,
    SHARED_FC2,
    SHARED_GATE,
)
from megatron_prefix.model.names import SINKS

NOT_OF_A_MODULE = {SHARED_GATE: "weight", SINKS: "", CORRECTION: ""}
"""Parameters that are no weight or bias of a module, and what their tensors' names end in."""
_Module = tuple[str, bool, bool]
"""Its name, whether it is there, whether it has a bias."""


def parameters_of_layer(sizes: ModelSizes, layer: int) -> list[str]:
    """The parameters of a layer, counted from 0, in order."""
    parts = sizes.architecture
    has_before, has_after = parts.norms != "after", parts.norms != "before"
    modules = [
        (INPUT_NORM, has_before, parts.norm_bias),
        *_attention(sizes),
        (ATTENTION_NORM, has_after, parts.norm_bias),
        (PRE_MLP_NORM, has_before and not parts.parallel_layers, parts.norm_bias),
        *_feed_forward(sizes, layer),
        (MLP_NORM, has_after, parts.norm_bias),
    ]
    kinds = {False: ("weight",), True: ("weight", "bias")}
    return [
        module if module in NOT_OF_A_MODULE else f"{module}.{kind}"
        for module, is_there, has_bias in modules
        for kind in kinds[has_bias]
        if is_there
    ]


def _attention(sizes: ModelSizes) -> list[_Module]:
    parts, latent = sizes.architecture, sizes.architecture.latent
    if latent is not None:
        has_rank = latent.query_rank is not None
        return [
            (Q_PROJ, not has_rank, False),
            (Q_DOWN, has_rank, latent.down_bias),
            (Q_NORM, has_rank, False),
            (Q_UP, has_rank, False),
            (KV_DOWN, True, latent.down_bias),
            (KV_NORM, True, False),
            (KV_UP, True, False),
            (PROJ, True, parts.output_bias),
        ]
    has_qk_norm = sizes.qk_layernorm or parts.qk_norm != "none"
    return [
        (QKV, True, sizes.add_qkv_bias),
        (Q_NORM, has_qk_norm, False),
        (K_NORM, has_qk_norm, False),
        (PROJ, True, parts.output_bias),
        (SINKS, sizes.softmax_type == "learnable", False),
    ]


def _feed_forward(sizes: ModelSizes, layer: int) -> list[_Module]:
    parts, routing = sizes.architecture, sizes.architecture.routing
    if not sizes.has_experts(layer):
        return [(FC1, True, parts.mlp_bias), (FC2, True, parts.mlp_bias)]
    modules = [(ROUTER, True, parts.expert_bias)]
    modules += [(CORRECTION, routing is not None and routing.score == "sigmoid", False)]
    for expert in range(sizes.num_moe_experts):
        own = [numbered(module, expert) for module in (EXPERT_FC1, EXPERT_FC2)]
        modules += [(module, True, parts.expert_bias) for module in own]
    has_shared = parts.shared_expert_size > 0
    modules += [(SHARED_FC1, has_shared, False), (SHARED_FC2, has_shared, False)]
    return [*modules, (SHARED_GATE, has_shared and parts.shared_expert_gate, False)]


def shape_of(sizes: ModelSizes, module: str) -> tuple[list[int], int]:
    """Rows of each part of a module's weight, and its columns; 0 for a vector."""
    parts, latent = sizes.architecture, sizes.architecture.latent
    heads, head_dim, hidden = sizes.num_attention_heads, sizes.kv_channels, sizes.hidden_size
    query, key = heads * head_dim, sizes.num_query_groups * head_dim
    gates = 2 if parts.gated_linear_unit else 1
    ffn, expert = sizes.ffn_hidden_size, sizes.moe_ffn_hidden_size
    known: dict[str, tuple[list[int], int]] = {
        QKV: ([query, key, key], hidden),
        Q_NORM: _qk_norm_shape(sizes, heads),
        K_NORM: _qk_norm_shape(sizes, sizes.num_query_groups),
        PROJ: ([hidden], query),
        SINKS: ([heads], 0),
        FC1: ([ffn] * gates, hidden),
        FC2: ([hidden], ffn),
        ROUTER: ([sizes.num_moe_experts], hidden),
        CORRECTION: ([sizes.num_moe_experts], 0),
        EXPERT_FC1: ([expert] * gates, hidden),
        EXPERT_FC2: ([hidden], expert),
        SHARED_FC1: ([parts.shared_expert_size] * gates, hidden),
        SHARED_FC2: ([hidden], parts.shared_expert_size),
        SHARED_GATE: ([1], hidden),
    }
    if latent is not None:
        known |= {
            Q_PROJ: ([query], hidden),
            Q_DOWN: ([latent.query_rank or 0], hidden),
            Q_NORM: ([latent.query_rank or 0], 0),
            Q_UP: ([query], latent.query_rank or 0),
            KV_DOWN: ([latent.down_rows], hidden),
            KV_NORM: ([latent.key_value_rank], 0),
            KV_UP: (
                [heads * (latent.unrotated_channels + latent.value_channels)],
                latent.key_value_rank,
            ),
            PROJ: ([hidden], heads * latent.value_channels),
        }
    return known.get(module, ([hidden], 0))


def _qk_norm_shape(sizes: ModelSizes, heads: int) -> tuple[list[int], int]:
    head_dim = sizes.kv_channels
    by_norm = {
        "none": ([head_dim], 0),
        "wide": ([heads * head_dim], 0),
        "by head": ([heads], head_dim),
    }
    return by_norm[sizes.architecture.qk_norm]


def numbered(module: str, expert: int) -> str:
    """`mlp.experts.linear_fc1` of expert 5 -> `mlp.experts.5.linear_fc1`."""
    return module.replace(".experts.", f".experts.{expert}.")
