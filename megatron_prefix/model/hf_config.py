"""Hugging Face's `config.json` <-> the sizes of a model.

Llama 2 and 3, Mistral, Qwen2 and 2.5, and Qwen3: what differs between them is which of biases,
query-key norms, tied embeddings and rotary scaling they have.
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
}
SCALINGS = ("linear", "llama3")
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is fetched of a model on the Hub: weights without pickles, configuration, tokenizer."""
QWEN3_HEAD_DIM = 128
"""What transformers takes where a Qwen3 configuration does not say."""


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
        "qk_layernorm": kind == "qwen3",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "vocab_size": _count(config, "vocab_size", source),
        **_rope_from_hf(config, source),
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
    if config["model_type"] in ("llama", "qwen3") and config.get("attention_bias"):
        raise InputError(
            f"{source}: attention_bias of {config['model_type']} puts a bias on the output "
            "projection too, which is not supported"
        )


def _rope_from_hf(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Both of Hugging Face's spellings: `rope_parameters`, and `rope_theta` + `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{source}: rotary scaling {rope!r} is not an object")
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
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
    if config.get("model_type") in ("qwen2", "qwen3"):
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
    with query-key norms, Qwen2 with query-key-value biases, else Llama.
    """
    if model.add_qkv_bias and model.qk_layernorm:
        raise InputError(
            "no supported Hugging Face architecture has both model.add_qkv_bias and "
            "model.qk_layernorm: train with one of them to export"
        )
    kind = "qwen3" if model.qk_layernorm else "qwen2" if model.add_qkv_bias else "llama"
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
    return config
