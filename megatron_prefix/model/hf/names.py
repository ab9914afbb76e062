"""What Hugging Face calls the tensors of a layer, by family.

Left is the canonical name of a parameter (model/names.py), right the tensors that it is made of.
If a parameter with several parts has one name only, that tensor has the parts one after another:

    self_attention.linear_qkv.weight: ("self_attn.qkv_proj.weight",)     queries, keys, values

A bias has the name of its weight; `.weight` and `.bias` are left out. Experts have `{expert}` in
place of their number; without it, one tensor has all of them (`Piece.expert`).
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_prefix.model.names import SINKS

Names = Mapping[str, tuple[str, ...]]

QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
ROUTER = "mlp.router"
EXPERT_FC1, EXPERT_FC2 = "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"
SHARED_FC1, SHARED_FC2 = "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"
SHARED_GATE = "mlp.shared_experts.gate_weight"
CORRECTION = "mlp.router.expert_bias"
INPUT_NORM, PRE_MLP_NORM = "input_layernorm", "pre_mlp_layernorm"
ATTENTION_NORM, MLP_NORM = "post_self_attn_layernorm", "post_mlp_layernorm"
Q_NORM, K_NORM = "self_attention.q_layernorm", "self_attention.k_layernorm"
Q_PROJ = "self_attention.linear_q_proj"
Q_DOWN, Q_UP = "self_attention.linear_q_down_proj", "self_attention.linear_q_up_proj"
KV_DOWN, KV_UP = "self_attention.linear_kv_down_proj", "self_attention.linear_kv_up_proj"
KV_NORM = "self_attention.kv_layernorm"

LLAMA: Names = {
    INPUT_NORM: ("input_layernorm",),
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    Q_NORM: ("self_attn.q_norm",),
    K_NORM: ("self_attn.k_norm",),
    PROJ: ("self_attn.o_proj",),
    SINKS: ("self_attn.sinks",),
    PRE_MLP_NORM: ("post_attention_layernorm",),
    FC1: ("mlp.gate_proj", "mlp.up_proj"),
    FC2: ("mlp.down_proj",),
    ROUTER: ("mlp.gate",),
    EXPERT_FC1: ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
    EXPERT_FC2: ("mlp.experts.{expert}.down_proj",),
}
QWEN2_MOE: Names = {
    **LLAMA,
    SHARED_FC1: ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    SHARED_FC2: ("mlp.shared_expert.down_proj",),
    SHARED_GATE: ("mlp.shared_expert_gate",),
}
MIXTRAL: Names = {
    **LLAMA,
    ROUTER: ("block_sparse_moe.gate",),
    EXPERT_FC1: ("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    EXPERT_FC2: ("block_sparse_moe.experts.{expert}.w2",),
}
GPT_OSS: Names = {
    **LLAMA,
    ROUTER: ("mlp.router",),
    EXPERT_FC1: ("mlp.experts.gate_up_proj",),
    EXPERT_FC2: ("mlp.experts.down_proj",),
}
"""Here one tensor has all experts, each transposed, and gate and up in turns."""
PHI3: Names = {**LLAMA, QKV: ("self_attn.qkv_proj",), FC1: ("mlp.gate_up_proj",)}
OLMO2: Names = {
    **LLAMA,
    ATTENTION_NORM: ("post_attention_layernorm",),
    MLP_NORM: ("post_feedforward_layernorm",),
}
GLM: Names = {**LLAMA, FC1: ("mlp.gate_up_proj",)}
GLM4: Names = {
    **GLM,
    ATTENTION_NORM: ("post_self_attn_layernorm",),
    MLP_NORM: ("post_mlp_layernorm",),
}
GEMMA2: Names = {
    **LLAMA,
    ATTENTION_NORM: ("post_attention_layernorm",),
    PRE_MLP_NORM: ("pre_feedforward_layernorm",),
    MLP_NORM: ("post_feedforward_layernorm",),
}
STARCODER2: Names = {**LLAMA, FC1: ("mlp.c_fc",), FC2: ("mlp.c_proj",)}
GLM_MOE: Names = {
    **LLAMA,
    CORRECTION: ("mlp.gate.e_score_correction_bias",),
    SHARED_FC1: ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    SHARED_FC2: ("mlp.shared_experts.down_proj",),
}
DEEPSEEK: Names = {
    **GLM_MOE,
    Q_PROJ: ("self_attn.q_proj",),
    Q_DOWN: ("self_attn.q_a_proj",),
    Q_NORM: ("self_attn.q_a_layernorm",),
    Q_UP: ("self_attn.q_b_proj",),
    KV_DOWN: ("self_attn.kv_a_proj_with_mqa",),
    KV_NORM: ("self_attn.kv_a_layernorm",),
    KV_UP: ("self_attn.kv_b_proj",),
}
