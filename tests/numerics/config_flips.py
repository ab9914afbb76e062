"""Values that a key of `config.json` may be given, for random configurations of every family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

ABSENT = "absent"
"""The key is left out, so that it has transformers' default."""
LONGEST = "longest path"
"""Replaced by the tokens of the data's longest path."""
LAYERS = 2
BASE = {
    "vocab_size": 270,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "sliding_window": None,
}
_GROWING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.5,
    "max_position_embeddings": 128,
}
WINDOWED = {**BASE, "sliding_window": 8}
MIXTURE = {"num_experts_per_tok": 2}
_LATENT = {
    **{**BASE, **MIXTURE, "num_key_value_heads": 6, "moe_intermediate_size": 24},
    **{"kv_lora_rank": 20, "q_lora_rank": 28, "v_head_dim": 12, "first_k_dense_replace": 1},
    **{"qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "n_routed_experts": 8},
    **{"n_group": 4, "topk_group": 2},
}
_NOT_OF_LITE = ("first_k_dense_replace", "head_dim")
BASES = {
    "llama": BASE,
    "mistral": BASE,
    "qwen2": BASE,
    "qwen3": BASE,
    "mixtral": {**BASE, **MIXTURE, "num_local_experts": 4},
    "qwen3_moe": {**BASE, **MIXTURE, "num_experts": 4, "moe_intermediate_size": 40},
    "qwen2_moe": {
        **{**BASE, **MIXTURE, "num_experts": 4, "moe_intermediate_size": 40},
        "shared_expert_intermediate_size": 24,
    },
    "gpt_oss": {**WINDOWED, **MIXTURE, "num_local_experts": 4, "rope_parameters": None},
    "phi3": {**BASE, "original_max_position_embeddings": 2048, "pad_token_id": None},
    "olmo2": BASE,
    "smollm3": {**BASE, "no_rope_layers": [1, 0], "pad_token_id": None},
    "granite": BASE,
    "glm": {**BASE, "head_dim": 16, "pad_token_id": None},
    "glm4": {**BASE, "head_dim": 16, "pad_token_id": None},
    "cohere": BASE,
    "cohere2": WINDOWED,
    "starcoder2": BASE,
    "gemma": BASE,
    "gemma2": {**WINDOWED, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 20},
    "olmo3": WINDOWED,
    "ministral": WINDOWED,
    "ministral3": {**BASE, "rope_parameters": _GROWING},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe": {
        **{**BASE, **MIXTURE, "head_dim": 16, "n_routed_experts": 8, "moe_intermediate_size": 24},
        **{"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    },
    "glm4_moe_lite": {key: x for key, x in _LATENT.items() if key not in _NOT_OF_LITE},
}
FULL, SLIDING = "full_attention", "sliding_attention"
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 2.0, 3.0, 4.0],
}
_SCALINGS = [
    {"type": "linear", "factor": 3.0},
    {"rope_type": "linear", "type": "default", "factor": 2, "rope_theta": 700.0},
    {**_LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 500.0},
    {**_LLAMA3, "original_max_position_embeddings": 32},
    _LLAMA3,
    {"type": "default"},
    {"rope_type": "default", "factor": 4.0},
    {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 0.8, "beta_slow": 2},
    _GROWING,
    {**_GROWING, "llama_4_scaling_beta": 0.0},
    {"rope_type": "yarn", "attention_factor": 1.2, "factor": 2.0, "truncate": False},
    {"rope_type": "dynamic", "factor": 4.0},
    {**_LONGROPE, "factor": 4.0, "original_max_position_embeddings": 64},
    _LONGROPE,
    {**_LONGROPE, "partial_rotary_factor": 0.5, "short_factor": [1.0, 2.0], "rope_theta": 90.0},
    {"type": "linear"},
    None,
    ABSENT,
]
SWITCH = [True, False, ABSENT]
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["swish", "silu", "gelu", "relu", "gelu_pytorch_tanh", "mish", ABSENT],
    "rms_norm_eps": [0.5, 1e-2, ABSENT],
    "num_attention_heads": [3, 12, 5],
    "num_key_value_heads": [6, 1, 3, 4, None, ABSENT],
    "head_dim": [16, 12, 7, None, ABSENT],
    "intermediate_size": [64],
    "num_hidden_layers": [1, 3],
    "hidden_size": [96],
    "vocab_size": [300, 100],
    "tie_word_embeddings": SWITCH,
    "rope_theta": [500.0, 1000000, ABSENT],
    "rope_parameters": _SCALINGS,
    "rope_scaling": _SCALINGS,
    "max_position_embeddings": [64, 128, ABSENT],
    "original_max_position_embeddings": [16, 64],
    "partial_rotary_factor": [0.5, 1.0],
    "attention_bias": SWITCH,
    "hidden_activation": ["gelu", "gelu_pytorch_tanh", "tanh", ABSENT],
    "use_bias": SWITCH,
    "swiglu_limit": [0.5, 3.0, 0.0],
    "swiglu_alpha": [1.702, 1.0],
    "qkv_bias": SWITCH,
    "shared_expert_intermediate_size": [32, 0, None],
    "use_qk_norm": SWITCH,
    "norm_epsilon": [0.5, 1e-2, ABSENT],
    "layer_norm_eps": [0.5, 1e-2, ABSENT],
    "logit_scale": [0.5, 2.0, None, ABSENT],
    "query_pre_attn_scalar": [8, 256, ABSENT],
    "attn_logit_softcapping": [5.0, None, ABSENT],
    "use_bidirectional_attention": SWITCH,
    "residual_dropout": [0.2],
    "embedding_dropout": [0.2],
    "sliding_window_pattern": [1, 2],
    "_sliding_window_pattern": [2],
    "rope_local_base_freq": [90.0],
    "no_rope_layers": [[1, 1], [0, 0, 1], [1], [2, 0], None, ABSENT],
    "no_rope_layer_interval": [1, 2],
    "embedding_multiplier": [3.0, 2, 0.0],
    "residual_multiplier": [0.5, -1.0],
    "attention_multiplier": [0.5, 2],
    "logits_scaling": [4.0, 0.5],
    "resid_pdrop": [0.2],
    "embd_pdrop": [0.2],
    "mlp_bias": SWITCH,
    "sliding_window": [8, 4096, LONGEST, 0, None, ABSENT],
    "use_sliding_window": SWITCH,
    "max_window_layers": [0, 1, 2, 28, ABSENT],
    "layer_types": [[FULL] * LAYERS, [FULL, SLIDING], [SLIDING], ["chunked_attention"] * LAYERS],
    "num_local_experts": [2, 3],
    "num_experts": [2, 3],
    "num_experts_per_tok": [1, 3, 5, ABSENT],
    "moe_intermediate_size": [24],
    "norm_topk_prob": SWITCH,
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [0], None],
    "router_jitter_noise": [0.0, 0.1],
    "router_aux_loss_coef": [0.5],
    "output_router_logits": [True],
    "attention_dropout": [0.3],
    "initializer_range": [0.5],
    "use_cache": [False],
    "pretraining_tp": [1, 2],
    "pad_token_id": [0, 5, None],
    "bos_token_id": [3, None],
    "eos_token_id": [4, [4, 5]],
    "dtype": ["float32", "bfloat16"],
    "torch_dtype": ["float16"],
    "architectures": [["LlamaForCausalLM"], ["Model"], None],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0}],
    "num_labels": [1],
    "problem_type": ["regression"],
    "return_dict": [False],
    "output_hidden_states": [True],
    "output_attentions": [True],
    "chunk_size_feed_forward": [2],
    "is_encoder_decoder": [True, False],
    "is_decoder": [True],
    "transformers_version": ["4.30.0"],
    "_name_or_path": ["elsewhere"],
    "temperature": [0.5],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.5}}],
    "auto_map": [{"AutoConfig": "configuration.Own"}, {"AutoTokenizer": "tokenization.Own"}],
    "final_logit_softcapping": [30.0, 1.0, None, ABSENT],
    "n_shared_experts": [0, 1, 2, ABSENT],
    "kv_lora_rank": [16],
    "q_lora_rank": [None, 24],
    "qk_nope_head_dim": [6, 5],
    "qk_rope_head_dim": [4, 3],
    "qk_head_dim": [18, 20],
    "v_head_dim": [8, 24],
    "first_k_dense_replace": [0, 2, 3, -1],
    "n_routed_experts": [4, 6],
    "n_group": [1, 2, 3, 8, None],
    "topk_group": [1, 4],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc", "other", ABSENT],
    "mlp_layer_types": [["dense"] * LAYERS, ["sparse", "dense"], ["sparse"] * LAYERS, ["dense"]],
    "scoring_func": ["sigmoid", "softmax"],
    "routed_scaling_factor": [2.0, 1, 0.0],
    "rope_interleave": SWITCH,
    "num_nextn_predict_layers": [0, 1],
    "num_mtp_layers": [0, 2],
    "moe_layer_freq": [1, 2],
    "aux_loss_alpha": [0.5],
    "seq_aux": [True],
    "ep_size": [2],
}
STORED = ("as saved", "without prefix", "sharded", "bfloat16", "only the head", "both, equal")
"""How the weights are stored; the last two if the embeddings are tied."""


@dataclass(frozen=True)
class Case:
    """A `config.json`, the keys in it that were flipped, and how the weights are stored."""

    seed: int
    config: dict[str, Any]
    flips: tuple[str, ...]
    stored: str


def random_case(seed: int, longest: int) -> Case:
    """One to three flips of one family; the same for the same seed."""
    rng = np.random.default_rng(seed)
    kind = list(BASES)[seed % len(BASES)]
    config: dict[str, Any] = {"model_type": kind, **BASES[kind]}
    keys = list(VALUES)
    # a case of each key in turn, and random ones with it
    more = rng.choice(len(keys), size=rng.integers(0, 3), replace=False)
    flips = dict.fromkeys([keys[(seed + seed // len(BASES)) % len(keys)], *(keys[i] for i in more)])
    for key in flips:
        value = VALUES[key][rng.integers(len(VALUES[key]))]
        if value == ABSENT:
            config.pop(key, None)
        else:
            config[key] = json.loads(json.dumps(longest if value == LONGEST else value))
    return Case(seed, config, tuple(flips), STORED[rng.integers(len(STORED))])
