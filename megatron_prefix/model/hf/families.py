"""The model types that can be read: what differs from Llama, as one entry each.

An entry has the names of the tensors, the parts that all models of the type have, and the keys of
`config.json` that set a part (family.py). keys.py has what is common to all.
"""

from __future__ import annotations

from megatron_prefix.config.parts import Architecture
from megatron_prefix.model.hf import names
from megatron_prefix.model.hf.family import Family, Key
from megatron_prefix.model.hf.keys import Only


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


WITH_STATE = _keys(
    """
    bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe
    lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2
    """
)
"""Model types with layers that carry a state from token to token: Mamba, gated delta rule, linear
attention, convolution. See docs/design.md."""

_NOT_READ = _keys("attention_bias")
"""The biases of these types do not depend on it."""
_BY_LAYER = _keys("sliding_window use_sliding_window max_window_layers layer_types")
_ATTENTION_BIAS = {"output_bias": Key("attention_bias")}
"""The output projection has the bias of queries, keys and values."""
_SQRT_WIDTH = {"embedding_multiplier": Key("hidden_size", 0.5)}
_CAUSAL = {"use_bidirectional_attention": Only((False, None), "attention is causal")}
_GEMMA2 = {
    **_ATTENTION_BIAS,
    **_SQRT_WIDTH,
    "softmax_scale": Key("query_pre_attn_scalar", -0.5),
    "final_logit_softcapping": Key("final_logit_softcapping"),
}
_BY_GROUPS = _keys(
    """
    n_routed_experts num_experts num_local_experts num_experts_per_tok moe_intermediate_size
    n_shared_experts n_group topk_group routed_scaling_factor
    """
)
_LATENT = _BY_GROUPS | _keys(
    "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim first_k_dense_replace"
)
_FURTHER_TOKENS = _keys("num_nextn_predict_layers num_mtp_layers")
"""Layers that predict further tokens are for generation; files.py refuses their weights."""
_LATENT_UNREAD = _keys("qk_head_dim aux_loss_alpha seq_aux ep_size")
"""The first is a sum of others; the rest is about training."""
_EVERY_LAYER = Only((1, None), "all layers after the dense ones have experts")
_BIASES = {**_ATTENTION_BIAS, "mlp_bias": Key("mlp_bias")}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        qkv_bias="attention_bias",
        set_by=_BIASES,
        no_effect=_keys("sliding_window"),
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        classifier="MistralForSequenceClassification",
        window="every layer",
        read=_keys("sliding_window"),
        no_effect=_NOT_READ,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
        qkv_bias=True,
        window="layer_types",
        read=_BY_LAYER,
        no_effect=_NOT_READ,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
        qk_norm=True,
        qkv_bias="attention_bias",
        set_by=_ATTENTION_BIAS,
        window="layer_types",
        read=_BY_LAYER,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        classifier="MixtralForSequenceClassification",
        names=names.MIXTRAL,
        experts="num_local_experts",
        window="every layer",
        read=_keys("sliding_window num_local_experts num_experts num_experts_per_tok"),
        no_effect=_NOT_READ,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        classifier="Qwen3MoeForSequenceClassification",
        qk_norm=True,
        experts="num_experts",
        window="every layer",
        read=_keys(
            """
            sliding_window use_sliding_window num_experts num_local_experts num_experts_per_tok
            moe_intermediate_size norm_topk_prob
            """
        ),
        no_effect=_keys("max_window_layers"),  # unlike Qwen3, a window limits every layer
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        classifier="Qwen2MoeForSequenceClassification",
        names=names.QWEN2_MOE,
        parts=Architecture(shared_expert_gate=True),
        qkv_bias="qkv_bias",
        experts="num_experts",
        shared_expert="shared_expert_intermediate_size",
        window="layer_types",
        read=_BY_LAYER
        | _keys("num_experts num_local_experts num_experts_per_tok moe_intermediate_size")
        | _keys("norm_topk_prob"),
        no_effect=_NOT_READ,
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        classifier="GptOssForSequenceClassification",
        names=names.GPT_OSS,
        parts=Architecture(expert_bias=True, linear_offset=1.0),
        fixed_activation="quick_gelu",
        sinks=True,
        qkv_bias="attention_bias",
        set_by={**_ATTENTION_BIAS, "gate_limit": Key("swiglu_limit")},
        experts="num_local_experts",
        window="layer_types",
        read=_keys("sliding_window layer_types num_local_experts num_experts num_experts_per_tok"),
        no_effect=_keys("hidden_act experts_per_token initial_context_length rope_ntk_alpha"),
        only_some={"swiglu_alpha": Only((1.702,), "the gate is x sigmoid(1.702 x)")},
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        classifier="Phi3ForSequenceClassification",
        names=names.PHI3,
        window="every layer",
        partial_rotary=True,
        read=_keys("sliding_window"),
        no_effect=_NOT_READ | _keys("embd_layer"),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        classifier="Olmo2ForSequenceClassification",
        names=names.OLMO2,
        parts=Architecture(norms="after", qk_norm="wide"),
        qkv_bias="attention_bias",
        set_by=_ATTENTION_BIAS,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        classifier="SmolLM3ForSequenceClassification",
        qkv_bias="attention_bias",
        set_by=_BIASES,
        window="layer_types",
        rotary="no_rope_layers",
        read=_keys("sliding_window use_sliding_window layer_types no_rope_layers"),
        no_effect=_keys("no_rope_layer_interval max_window_layers"),  # read by the configuration
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        qkv_bias="attention_bias",
        set_by={
            **_BIASES,
            "embedding_multiplier": Key("embedding_multiplier"),
            "residual_multiplier": Key("residual_multiplier"),
            "softmax_scale": Key("attention_multiplier"),
            "logits_multiplier": Key("logits_scaling", -1.0),
        },
    ),
    "glm": Family(
        architecture="GlmForCausalLM",
        classifier="GlmForSequenceClassification",
        names=names.GLM,
        parts=Architecture(rotary_interleaved=True),
        qkv_bias="attention_bias",
        partial_rotary=True,
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        classifier="Glm4ForSequenceClassification",
        names=names.GLM4,
        parts=Architecture(rotary_interleaved=True, norms="both"),
        qkv_bias="attention_bias",
        partial_rotary=True,
    ),
    "cohere": Family(
        architecture="CohereForCausalLM",
        parts=Architecture(normalization="layer", parallel_layers=True, rotary_interleaved=True),
        epsilon="layer_norm_eps",
        qkv_bias="attention_bias",
        set_by={**_ATTENTION_BIAS, "logits_multiplier": Key("logit_scale")},
        head_norm_key="use_qk_norm",
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        parts=Architecture(normalization="layer", parallel_layers=True, rotary_interleaved=True),
        epsilon="layer_norm_eps",
        qkv_bias="attention_bias",
        set_by={**_ATTENTION_BIAS, "logits_multiplier": Key("logit_scale")},
        window="layer_types",
        rotary="sliding layers",
        read=_keys("sliding_window layer_types"),
        no_effect=_keys("sliding_window_pattern _sliding_window_pattern"),  # gives layer_types
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        classifier="Starcoder2ForSequenceClassification",
        names=names.STARCODER2,
        parts=Architecture(normalization="layer", norm_bias=True, gated_linear_unit=False),
        epsilon="norm_epsilon",
        qkv_bias="use_bias",
        set_by={"output_bias": Key("use_bias"), "mlp_bias": Key("use_bias")},
        window="every layer",
        read=_keys("sliding_window"),
        no_effect=_NOT_READ | _keys("residual_dropout embedding_dropout"),
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        classifier="GemmaForSequenceClassification",
        parts=Architecture(norm_adds_one=True),
        qkv_bias="attention_bias",
        set_by={**_ATTENTION_BIAS, **_SQRT_WIDTH},
        only_some=_CAUSAL,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        classifier="Gemma2ForSequenceClassification",
        names=names.GEMMA2,
        parts=Architecture(norm_adds_one=True, norms="both"),
        activation="hidden_activation",
        qkv_bias="attention_bias",
        set_by=_GEMMA2,
        window="layer_types",
        read=_keys("sliding_window layer_types attn_logit_softcapping"),
        no_effect=_keys("hidden_act"),
        only_some=_CAUSAL,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
        names=names.GEMMA2,
        parts=Architecture(norm_adds_one=True, norms="both"),
        activation="hidden_activation",
        qkv_bias="attention_bias",
        qk_norm=True,
        set_by=_GEMMA2,
        window="layer_types",
        rotary="by layer type",
        read=_keys("sliding_window layer_types rope_local_base_freq"),
        # the patterns give layer_types; attention does not read its soft cap
        no_effect=_keys(
            """
            hidden_act sliding_window_pattern _sliding_window_pattern attn_logit_softcapping
            """
        ),
        only_some=_CAUSAL,
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        classifier="Olmo3ForSequenceClassification",
        names=names.OLMO2,
        parts=Architecture(norms="after", qk_norm="wide"),
        qkv_bias="attention_bias",
        set_by=_ATTENTION_BIAS,
        window="layer_types",
        rotary="by layer type",
        read=_keys("sliding_window layer_types"),
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        classifier="MinistralForSequenceClassification",
        window="layer_types",
        read=_keys("sliding_window layer_types"),
        no_effect=_NOT_READ,
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        classifier="Ministral3ForSequenceClassification",
        window="every layer",
        query_growth=True,
        read=_keys("sliding_window"),
        no_effect=_NOT_READ,
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        classifier="DeepseekV2ForSequenceClassification",
        names=names.DEEPSEEK,
        parts=Architecture(rotary_interleaved=True),
        set_by=_ATTENTION_BIAS,
        experts="n_routed_experts",
        latent=True,
        routing="softmax",
        read=_LATENT | _keys("topk_method"),
        no_effect=_LATENT_UNREAD | _keys("norm_topk_prob"),  # weights are never normalised
        only_some={
            "moe_layer_freq": _EVERY_LAYER,
            "scoring_func": Only(("softmax", None), "scores of experts are a softmax"),
        },
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        classifier="DeepseekV3ForSequenceClassification",
        names=names.DEEPSEEK,
        set_by={**_ATTENTION_BIAS, "rotary_interleaved": Key("rope_interleave")},
        experts="n_routed_experts",
        latent=True,
        routing="sigmoid",
        read=_LATENT | _keys("norm_topk_prob"),
        no_effect=_LATENT_UNREAD | _FURTHER_TOKENS,
        only_some={
            "moe_layer_freq": _EVERY_LAYER,
            "scoring_func": Only(("sigmoid", None), "scores of experts are sigmoids"),
            "topk_method": Only(("noaux_tc", None), "experts are chosen with a correction bias"),
        },
    ),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        names=names.GLM_MOE,
        qkv_bias="attention_bias",
        qk_norm="use_qk_norm",
        partial_rotary=True,
        experts="n_routed_experts",
        routing="sigmoid",
        read=_BY_GROUPS | _keys("first_k_dense_replace norm_topk_prob"),
        no_effect=_FURTHER_TOKENS,
    ),
    "glm4_moe_lite": Family(
        architecture="Glm4MoeLiteForCausalLM",
        names=names.DEEPSEEK,
        set_by={**_ATTENTION_BIAS, "rotary_interleaved": Key("rope_interleave")},
        experts="n_routed_experts",
        latent=True,
        routing="sigmoid",
        read=_LATENT - {"first_k_dense_replace"} | _keys("mlp_layer_types norm_topk_prob"),
        no_effect=_LATENT_UNREAD | _FURTHER_TOKENS,
    ),
}
