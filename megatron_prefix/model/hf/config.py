"""Hugging Face's `config.json` <-> the sizes of a model.

Llama 2 and 3, Mistral, Qwen2 and 2.5, and Qwen3: what differs between them is which of biases,
query-key norms, tied embeddings and rotary scaling they have. Mixtral is Mistral, and Qwen3-MoE is
Qwen3, with a mixture of experts in every layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prefix.errors import InputError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MIXTURES = ("mixtral", "qwen3_moe")
SCALINGS = ("linear", "llama3")
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is fetched of a model on the Hub: weights without pickles, configuration, tokenizer."""
QWEN3_HEAD_DIM = 128
MIXTRAL_ROPE_THETA = 1e6
"""What transformers takes where a Qwen3 or a Mixtral configuration does not say."""


def locate(model: str) -> Path:
    """The directory of a model: as given, or the local copy of a Hub id. Raises InputError."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists() or model.startswith((".", "/", "~")):
        raise InputError(f"{model}: no such directory; give one with config.json and safetensors")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{model}: neither a directory nor a model that the Hub gives "
            f"({' '.join(str(error).split())[:200]})"
        ) from None


def read_hf_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model's directory. Raises InputError."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give a Hugging Face model's directory"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}): fetch the model again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a Hugging Face model's configuration")
    return config


def sizes_from_hf(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings of config.ModelConfig, and `vocab_size`, that describe the model.

    Raises InputError, naming the key and `source`, for what is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{source}: model_type {kind!r} is not supported; one of {known} is")
    _refuse_unsupported(config, source)
    heads = _count(config, "num_attention_heads", source)
    hidden = _count(config, "hidden_size", source)
    groups = heads
    if kind != "llama" or config.get("num_key_value_heads") is not None:
        groups = _count(config, "num_key_value_heads", source)
    if config.get("head_dim") is not None:
        head_dim = _count(config, "head_dim", source)
    else:
        head_dim = QWEN3_HEAD_DIM if kind == "qwen3" else hidden // heads
    if heads % groups or head_dim % 2 or not head_dim:
        raise InputError(
            f"{source}: {heads} query heads over {groups} key-value heads of {head_dim} channels: "
            "heads must share key-value heads evenly, and have an even number of channels"
        )
    return {
        "num_layers": _count(config, "num_hidden_layers", source),
        "hidden_size": hidden,
        "ffn_hidden_size": _count(config, "intermediate_size", source),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "norm_epsilon": _number(config, "rms_norm_eps", source),
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind in ("qwen3", "qwen3_moe"),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "vocab_size": _count(config, "vocab_size", source),
        **_rope_from_hf(config, source),
        **(_experts_from_hf(config, source) if kind in MIXTURES else {}),
    }


def _experts_from_hf(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Both of Hugging Face's names for their number: `num_local_experts`, `num_experts`."""
    is_qwen = config["model_type"] == "qwen3_moe"
    spelled = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    experts, topk = _count(config, spelled, source), _count(config, "num_experts_per_tok", source)
    if topk > experts:
        raise InputError(f"{source}: num_experts_per_tok is {topk}, above {spelled} = {experts}")
    size = "moe_intermediate_size" if is_qwen else "intermediate_size"
    return {
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": _count(config, size, source),
        "moe_router_pre_softmax": is_qwen and not config.get("norm_topk_prob", False),
    }


def _count(config: dict[str, Any], key: str, source: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{source}: {key} is {value!r}, expected a positive number")
    return value


def _number(config: dict[str, Any], key: str, source: str) -> float:
    value = config.get(key)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise InputError(f"{source}: {key} is {value!r}, expected a positive number")
    return float(value)


def _refuse_unsupported(config: dict[str, Any], source: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{source}: hidden_act {config['hidden_act']!r}; only silu is supported")
    for key in ("mlp_bias", "quantization_config"):
        if config.get(key):
            raise InputError(f"{source}: {key} is not supported")
    _refuse_mixtures(config, source)
    if config["model_type"] in ("llama", "qwen3", "qwen3_moe") and config.get("attention_bias"):
        raise InputError(
            f"{source}: attention_bias of {config['model_type']} puts a bias on the output "
            "projection too, which is not supported"
        )


def _refuse_mixtures(config: dict[str, Any], source: str) -> None:
    """Experts that are shared or absent in some layers, and routers that drop or shake tokens."""
    reasons = {
        "capacity_factor": "experts take every token that is sent to them, and drop none",
        "expert_capacity": "experts take every token that is sent to them, and drop none",
        "router_jitter_noise": "routing is a function of the weights",
        "shared_expert_intermediate_size": "there are no shared experts",
        "n_shared_experts": "there are no shared experts",
        "mlp_only_layers": "every layer has experts",
    }
    for key, reason in reasons.items():
        if config.get(key):
            raise InputError(f"{source}: {key} = {config[key]!r} is not supported: {reason}")
    if (step := config.get("decoder_sparse_step", 1)) != 1:
        raise InputError(
            f"{source}: decoder_sparse_step = {step!r} is not supported: every layer has experts"
        )


def _rope_from_hf(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Both of Hugging Face's spellings: `rope_parameters`, and `rope_theta` + `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{source}: rotary scaling {rope!r} is not an object")
    absent = MIXTRAL_ROPE_THETA if config["model_type"] == "mixtral" else 10000.0
    base = rope.get("rope_theta", config.get("rope_theta", absent))
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"rotary_base": _number({"rope_theta": base}, "rope_theta", source)}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{source}: partial_rotary_factor is not supported")
    if kind == "default":
        return found
    if kind not in SCALINGS:
        raise InputError(
            f"{source}: rotary scaling {kind!r} is not supported; {' and '.join(SCALINGS)} are"
        )
    scaling: dict[str, Any] = {"type": kind, "factor": _number(rope, "factor", source)}
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            scaling[name] = _number(rope, name, source)
        name = "original_max_position_embeddings"
        scaling[name] = _count(rope if name in rope else config, name, source)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise InputError(f"{source}: high_freq_factor must exceed low_freq_factor in {rope}")
    return found | {"rope_scaling": scaling}


def sliding_window(config: dict[str, Any]) -> int | None:
    """Tokens that attention looks back, itself included, in at least one layer; None: all.

    Qwen limits only with `use_sliding_window`, and only layers from `max_window_layers` on.
    """
    window = config.get("sliding_window")
    if config.get("model_type") == "llama" or type(window) is not int:
        return None
    if config.get("model_type") in ("qwen2", "qwen3", "qwen3_moe"):
        first = config.get("max_window_layers", 0)
        types = config.get("layer_types") or ["sliding_attention"]
        if (
            not config.get("use_sliding_window")
            or first >= config["num_hidden_layers"]
            or "sliding_attention" not in types
        ):
            return None
    return window


def hf_from_sizes(model: Any, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """A `config.json` for a model that did not come from Hugging Face.

    The plainest architecture that has what `model` (config.ModelConfig with sizes) has: Qwen3
    with query-key norms, Qwen2 with query-key-value biases, else Llama; with experts Qwen3-MoE
    with query-key norms, else Mixtral.
    """
    if model.add_qkv_bias and model.qk_layernorm:
        raise InputError(
            "no supported Hugging Face architecture has both model.add_qkv_bias and "
            "model.qk_layernorm: train with one of them to export"
        )
    kind = "qwen3" if model.qk_layernorm else "qwen2" if model.add_qkv_bias else "llama"
    if model.num_moe_experts:
        if kind == "qwen2" or (kind == "llama" and model.moe_router_pre_softmax):
            raise InputError(
                "no supported Hugging Face architecture has model.num_moe_experts with "
                "model.add_qkv_bias, or with model.moe_router_pre_softmax and without "
                "model.qk_layernorm: train without them to export"
            )
        kind = "qwen3_moe" if model.qk_layernorm else "mixtral"
    head_dim = model.kv_channels or model.hidden_size // model.num_attention_heads
    if kind == "qwen2" and head_dim * model.num_attention_heads != model.hidden_size:
        raise InputError(
            f"Qwen2 has heads of hidden_size / num_attention_heads, and model.kv_channels is "
            f"{head_dim}: train without model.add_qkv_bias or model.kv_channels to export"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rope_scaling is not None:
        given = {k: v for k, v in vars(model.rope_scaling).items() if v is not None}
        rope |= {"rope_type": given.pop("type"), **given}
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": model.dtype,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "vocab_size": vocab_size,
    }
    if kind != "qwen2":
        config["head_dim"] = head_dim
    if kind in MIXTURES:
        size = model.moe_ffn_hidden_size or model.ffn_hidden_size
        config["num_experts_per_tok"] = model.moe_router_topk
        config["num_local_experts"] = model.num_moe_experts
        if kind == "mixtral":
            config |= {"intermediate_size": size, "sliding_window": None}
        else:
            config["num_experts"] = config.pop("num_local_experts")
            config["moe_intermediate_size"] = size
            config["norm_topk_prob"] = not model.moe_router_pre_softmax
    return config
