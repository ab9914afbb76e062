"""A small random model of every family by transformers, with all its features switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = {
    "vocab_size": 270,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,  # its embedding would have no gradient
}
HEAD_DIM = 8
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0],
}
MIXED = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 7,
}
"""A window shorter than the prompts."""
BIASES = {"attention_bias": True, "mlp_bias": True}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
"""Sizes of multi-latent attention."""
BY_GROUPS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}


def scaled(scaling: dict[str, Any], base: float = 500.0) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": base, **scaling}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases, yarn": ("llama", {**BIASES, **scaled(YARN), "tie_word_embeddings": True}),
    "llama, yarn by hand": (
        "llama",
        scaled({**YARN, "attention_factor": 1.3, "beta_fast": 8, "truncate": False}),
    ),
    "llama, yarn of DeepSeek": ("llama", scaled({**YARN, "mscale": 0.7, "mscale_all_dim": 0.4})),
    "llama, dynamic": ("llama", scaled({"rope_type": "dynamic", "factor": 4.0})),
    "llama, linear": ("llama", scaled({"rope_type": "linear", "factor": 4.0})),
    "llama, gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, longrope": (
        "llama",
        scaled(
            {
                **LONGROPE,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "factor": 8.0,
                "original_max_position_embeddings": 512,
            }
        ),
    ),
    "qwen3, biases": ("qwen3", {"attention_bias": True, "head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 6}),
    "qwen3 moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "head_dim": 16,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen2 moe": (
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            **MIXED,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            **MIXED,
            "head_dim": 16,
            "intermediate_size": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.2,
            "rope_parameters": {**YARN, "rope_theta": 500.0, "truncate": False},
        },
    ),
    "phi3": (
        "phi3",
        {
            "original_max_position_embeddings": 512,
            "sliding_window": 9,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75, "rope_theta": 500.0},
        },
    ),
    "olmo2": ("olmo2", {**scaled(LLAMA3), "attention_bias": True}),
    "smollm3": (
        "smollm3",
        {**BIASES, **MIXED, "no_rope_layers": [1, 0, 1], "use_sliding_window": True},
    ),
    "granite": (
        "granite",
        {
            **BIASES,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.6,
            "logits_scaling": 4.0,
        },
    ),
    "cohere": (
        "cohere",
        {"attention_bias": True, "use_qk_norm": True, "logit_scale": 0.3, **scaled(YARN)},
    ),
    "cohere2": ("cohere2", MIXED),
    "starcoder2": (
        "starcoder2",
        {"use_bias": True, "tie_word_embeddings": False, "sliding_window": 5},
    ),
    "gemma": ("gemma", {"head_dim": 16, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 30,
            "final_logit_softcapping": 2.0,
            **MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            },
        },
    ),
    "gemma2": (
        "gemma2",
        {**MIXED, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "olmo3": (
        "olmo3",
        {
            **MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {**YARN, "rope_theta": 500.0, "truncate": False},
            },
        },
    ),
    "ministral": ("ministral", {**MIXED, "head_dim": 16}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "sliding_window": 9,
            **scaled({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7}),
        },
    ),
    "mistral": ("mistral", {"sliding_window": 6, **scaled(YARN)}),
    "qwen2": ("qwen2", {**MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {**MIXED, "use_sliding_window": True, "head_dim": 16}),
    "deepseek v2, dense": (
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": None,
            "first_k_dense_replace": 3,
            **scaled({**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}),
        },
    ),
    "deepseek v3, dense": (
        "deepseek_v3",
        {
            **LATENT,
            "v_head_dim": 22,  # more channels than queries have
            "first_k_dense_replace": 3,
            "rope_interleave": False,
            "attention_bias": True,
        },
    ),
    "deepseek v2": (
        "deepseek_v2",
        {
            **LATENT,
            **BY_GROUPS,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "rms_norm_eps": 1e-3,
        },
    ),
    "deepseek v3": (
        "deepseek_v3",
        {
            **LATENT,
            **BY_GROUPS,
            "norm_topk_prob": True,
            **scaled({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
        },
    ),
    "glm moe": (
        "glm4_moe",
        {
            **BY_GROUPS,
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "glm moe lite": (
        "glm4_moe_lite",
        {
            **LATENT,
            **{key: x for key, x in BY_GROUPS.items() if key != "first_k_dense_replace"},
            "mlp_layer_types": ["dense", "dense", "sparse"],
        },
    ),
    "glm": ("glm", {"head_dim": 16, "attention_bias": True}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}


def make_family(name: str, directory: Path, spread: float = 0.2, **more: Any) -> torch.nn.Module:
    """Save a random model; norms and biases are off 1 and 0. The same every time. `spread` is the
    standard deviation of matrices."""
    kind, parts = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **parts, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else spread * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(directory, max_shard_size="60KB")
    return model.eval()
