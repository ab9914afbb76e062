"""Hugging Face's `config.json` -> the sizes of a model.

Llama 2 and 3, Mistral, Qwen2 and 2.5, and Qwen3 differ in biases, query-key norms, tied embeddings
and rotary scaling. Mixtral is Mistral, and Qwen3-MoE is Qwen3, with a mixture of experts in every
layer. export.py writes such a file for a model that did not come from Hugging Face.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_prefix.config import ModelSizes, RopeScaling
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
LM, REWARD = "ForCausalLM", "ForSequenceClassification"
SCALINGS = ("linear", "llama3")
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Files that are fetched from the Hub: weights without pickles, configuration, tokenizer."""
CHECKED: dict[str, tuple[type, str]] = {
    "architectures": (list, "a list of names"),
    "layer_types": (list, "a list of names"),
    "max_window_layers": (int, "a number of layers"),
    "num_hidden_layers": (int, "a number of layers"),
}
"""Keys whose values are used before the sizes are checked, with their type."""
QWEN3_HEAD_DIM = 128
MIXTRAL_ROPE_THETA = 1e6
"""Defaults of transformers if a Qwen3 or a Mixtral configuration gives no value."""


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face model's directory, as its `config.json` describes it."""

    directory: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, model: str) -> HFModel:
        """A directory as given, or the local copy of a Hub id. Raises InputError."""
        return cls.read(_locate(model))

    @classmethod
    def read(cls, directory: Path) -> HFModel:
        """Read `config.json` of a directory. Raises InputError."""
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
        for key, (kinds, expected) in CHECKED.items():
            value = config.get(key)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise InputError(f"{path}: {key} is {str(value)[:100]!r}, expected {expected}")
        return cls(directory, config)

    @property
    def source(self) -> str:
        """Path of `config.json`, for messages."""
        return f"{self.directory}/config.json"

    @cached_property
    def kind(self) -> str:
        """`reward` for a sequence classifier with one label, else `lm`. Raises InputError for a
        classifier with more labels."""
        names = self.config.get("architectures") or []
        if not any(isinstance(name, str) and name.endswith(REWARD) for name in names):
            return "lm"
        labels = self.config.get("id2label")
        count = len(labels) if isinstance(labels, dict) else self.config.get("num_labels", 2)
        if count != 1:
            raise InputError(
                f"{self.source}: a sequence classifier with {count} labels; a reward model has "
                "num_labels 1"
            )
        return "reward"

    @cached_property
    def sizes(self) -> ModelSizes:
        """Raises InputError, naming the key, for what is not supported."""
        return sizes_from_hf(self.config, self.source)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, unpadded. Raises InputError."""
        return _count(self.config, "vocab_size", self.source)

    @property
    def sliding_window(self) -> int | None:
        """Tokens that attention looks back, itself included, in at least one layer; None: all.

        Qwen limits only with `use_sliding_window`, and only layers from `max_window_layers` on.
        """
        config = self.config
        window = config.get("sliding_window")
        if config.get("model_type") == "llama" or type(window) is not int:
            return None
        if config.get("model_type") in ("qwen2", "qwen3", "qwen3_moe"):
            first = config.get("max_window_layers") or 0
            types = config.get("layer_types") or ["sliding_attention"]
            if (
                not config.get("use_sliding_window")
                or first >= _count(config, "num_hidden_layers", self.source)
                or "sliding_attention" not in types
            ):
                return None
        return window


def _locate(model: str) -> Path:
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


def sizes_from_hf(config: dict[str, Any], source: str) -> ModelSizes:
    """The sizes that a `config.json` gives.

    Raises InputError, naming the key and `source`, for what is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{source}: model_type {kind!r} is not supported; one of {known} is")
    _refuse_unsupported(config, source)
    heads = _count(config, "num_attention_heads", source)
    hidden = _count(config, "hidden_size", source)
    groups = heads  # Llama 1 and 2 may leave them out: every query head has its own key-value head
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
    try:
        return ModelSizes(
            num_layers=_count(config, "num_hidden_layers", source),
            hidden_size=hidden,
            ffn_hidden_size=_count(config, "intermediate_size", source),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=head_dim,
            norm_epsilon=_number(config, "rms_norm_eps", source),
            add_qkv_bias=kind == "qwen2",
            qk_layernorm=kind in ("qwen3", "qwen3_moe"),
            untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
            **_rope_from_hf(config, source),
            **(_experts_from_hf(config, source) if kind in MIXTURES else {}),
        )
    except ValidationError as error:
        raise InputError(_fault(error, source)) from None


def _fault(error: ValidationError, source: str) -> str:
    """The first value out of bounds, as a message."""
    fault = error.errors(include_url=False)[0]
    setting = ".".join(str(part) for part in fault["loc"])
    return f"{source}: {setting} = {str(fault['input'])[:100]}: {fault['msg']}"


def _experts_from_hf(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Hugging Face has two names for their number: `num_local_experts` and `num_experts`."""
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
    if type(value) is not int or not 1 <= value < 2**31:
        raise InputError(f"{source}: {key} is {value!r}, expected a number from 1 to 2^31 - 1")
    return value


def _number(config: dict[str, Any], key: str, source: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
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
            f"{source}: attention_bias of {config['model_type']} adds a bias to the output "
            "projection too, which is not supported"
        )


def _refuse_mixtures(config: dict[str, Any], source: str) -> None:
    """Experts that are shared or missing in some layers, and routers that drop tokens or add
    noise."""
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
    """Hugging Face has two spellings: `rope_parameters`, and `rope_theta` + `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{source}: rotary scaling {rope!r} is not an object")
    default = MIXTRAL_ROPE_THETA if config["model_type"] == "mixtral" else 10000.0
    base = rope.get("rope_theta", config.get("rope_theta", default))
    kind = rope.get("rope_type", rope.get("type", "default"))
    sizes: dict[str, Any] = {"rotary_base": _number({"rope_theta": base}, "rope_theta", source)}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{source}: partial_rotary_factor is not supported")
    if kind == "default":
        return sizes
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
    try:
        return sizes | {"rope_scaling": RopeScaling(**scaling)}
    except ValidationError as error:
        raise InputError(_fault(error, source)) from None
