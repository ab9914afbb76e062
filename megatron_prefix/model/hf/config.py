"""Hugging Face's `config.json` -> the sizes of a model.

Llama 2 and 3, Mistral, Qwen2 and 2.5, and Qwen3 differ in biases, query-key norms, tied embeddings
and rotary scaling. Mixtral is Mistral, and Qwen3-MoE is Qwen3, with a mixture of experts in every
layer (families.py). The values are those of transformers (reading.py). export.py writes such a
file for a model that did not come from Hugging Face.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_prefix.config import ModelSizes, RopeScaling
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.families import Family
from megatron_prefix.model.hf.reading import family_of, read_json, read_settings, refuse_adapter

LM, REWARD = "ForCausalLM", "ForSequenceClassification"
_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LLAMA3_KEYS = frozenset(
    {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
)
ROPE_KEYS = {
    "default": _ROPE_KEYS,
    "linear": _ROPE_KEYS | {"factor"},
    "llama3": _ROPE_KEYS | {"factor"} | _LLAMA3_KEYS,
}
"""Keys of `rope_parameters` by rotary scaling."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in `layer_types`."""
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Files that are fetched from the Hub: weights without pickles, configuration, tokenizer."""


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face model's directory; `config` is its `config.json` as it is."""

    directory: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, model: str) -> HFModel:
        """A directory as given, or the local copy of a Hub id. Raises InputError."""
        directory = _locate(model)
        refuse_adapter(directory)
        return cls.read(directory)

    @classmethod
    def read(cls, directory: Path) -> HFModel:
        """Read `config.json` of a directory. Raises InputError."""
        return cls(directory, read_json(directory))

    @property
    def source(self) -> str:
        """Path of `config.json`, for messages."""
        return f"{self.directory}/config.json"

    @cached_property
    def family(self) -> Family:
        """Raises InputError for a model type or a key that is not known."""
        return family_of(self.config, self.source)

    @cached_property
    def settings(self) -> Any:
        """The configuration that transformers makes of the directory. Raises InputError."""
        return read_settings(self.directory, self.family, self.source)

    @cached_property
    def kind(self) -> str:
        """`reward` for a sequence classifier, else `lm`. Raises InputError for names of another
        form."""
        names = self.config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{self.source}: architectures is {names!r}, expected a list of names")
        return "reward" if any(name.endswith(REWARD) for name in names) else "lm"

    @property
    def num_labels(self) -> int:
        """Scores of a sequence classifier; 1 for a language model."""
        return int(self.settings.num_labels) if self.kind == "reward" else 1

    @cached_property
    def sizes(self) -> ModelSizes:
        """Raises InputError, naming the key, for what is not supported."""
        return _sizes(self.settings, self.family, self.source)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, unpadded. Raises InputError."""
        return _count(self.settings, "vocab_size", self.source)


def _locate(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists() or model.startswith((".", "/", "~")):
        raise InputError(f"{model}: no such directory; give one with config.json and safetensors")
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            model, allow_patterns=list(MODEL_FILES), ignore_patterns=["consolidated*"]
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{model}: neither a directory nor a model that the Hub gives "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    return Path(directory)


def _sizes(settings: Any, family: Family, source: str) -> ModelSizes:
    heads = _count(settings, "num_attention_heads", source)
    groups = _count(settings, "num_key_value_heads", source)
    hidden = _count(settings, "hidden_size", source)
    if getattr(settings, "head_dim", None) is not None:
        head_dim = _count(settings, "head_dim", source)
    else:
        head_dim = hidden // heads
    if heads % groups or head_dim % 2 or not head_dim:
        raise InputError(
            f"{source}: {heads} query heads over {groups} key-value heads of {head_dim} channels: "
            "heads must share key-value heads evenly, and have an even number of channels"
        )
    try:
        return ModelSizes(
            num_layers=_count(settings, "num_hidden_layers", source),
            hidden_size=hidden,
            ffn_hidden_size=_count(settings, "intermediate_size", source),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=head_dim,
            norm_epsilon=_number(settings.rms_norm_eps, "rms_norm_eps", source),
            add_qkv_bias=family.qkv_bias,
            qk_layernorm=family.qk_norm,
            untie_embeddings_and_output_weights=not _switch(
                settings, "tie_word_embeddings", source
            ),
            **_windows(settings, family, source),
            **_rope(settings, source),
            **(_experts(settings, family.experts, source) if family.experts else {}),
        )
    except ValidationError as error:
        raise InputError(_fault(error, source)) from None


def _windows(settings: Any, family: Family, source: str) -> dict[str, Any]:
    """The sliding window and the layers that have it, as Megatron-Core counts: a token sees
    `sliding_window` tokens, itself included, and so `sliding_window` - 1 before it."""
    kinds = None
    if family.window == "none":
        return {}
    if family.window == "layer_types":
        num_layers = _count(settings, "num_hidden_layers", source)
        types = settings.layer_types or []
        if len(types) != num_layers or not set(types) <= {FULL, SLIDING}:
            raise InputError(
                f"{source}: layer_types {types!r} must name {FULL} or {SLIDING} for each of "
                f"{num_layers} layers"
            )
        if SLIDING not in types:
            return {}
        kinds = tuple(int(kind == SLIDING) for kind in types) if FULL in types else None
    elif settings.sliding_window is None:
        return {}
    window = _count(settings, "sliding_window", source)
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": kinds}


def _fault(error: ValidationError, source: str) -> str:
    """The first value out of bounds, as a message."""
    fault = error.errors(include_url=False)[0]
    setting = ".".join(str(part) for part in fault["loc"])
    return f"{source}: {setting} = {str(fault['input'])[:100]}: {fault['msg']}"


def _experts(settings: Any, key: str, source: str) -> dict[str, Any]:
    experts, topk = _count(settings, key, source), _count(settings, "num_experts_per_tok", source)
    if topk > experts:
        raise InputError(f"{source}: num_experts_per_tok is {topk}, above {key} = {experts}")
    is_qwen = hasattr(settings, "moe_intermediate_size")
    size = "moe_intermediate_size" if is_qwen else "intermediate_size"
    return {
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": _count(settings, size, source),
        "moe_router_pre_softmax": is_qwen and not _switch(settings, "norm_topk_prob", source),
    }


def _rope(settings: Any, source: str) -> dict[str, Any]:
    rope = settings.rope_parameters
    if not isinstance(rope, dict):
        raise InputError(f"{source}: rotary scaling {rope!r} is not an object")
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        *others, last = ROPE_KEYS
        raise InputError(
            f"{source}: rotary scaling {kind!r} is not supported; {', '.join(others)} and {last} "
            "are"
        )
    for key, value in rope.items():
        if key not in ROPE_KEYS[kind] and value is not None:
            raise InputError(
                f"{source}: rope_parameters.{key} = {value!r} is no setting of rotary scaling "
                f"{kind!r}: remove it, or choose another rope_type"
            )
    if rope.get("partial_rotary_factor") not in (1, None):
        raise InputError(
            f"{source}: partial_rotary_factor = {rope['partial_rotary_factor']!r} is not "
            "supported: all channels of a head are rotated"
        )
    base = _number(rope.get("rope_theta"), "rope_theta", source)
    sizes: dict[str, Any] = {"rotary_base": base}
    if kind == "default":
        return sizes
    scaling: dict[str, Any] = {
        "type": kind,
        "factor": _number(rope.get("factor"), "factor", source),
    }
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            scaling[name] = _number(rope.get(name), name, source)
        name = "original_max_position_embeddings"
        scaling[name] = _natural(rope.get(name), name, source)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise InputError(f"{source}: high_freq_factor must exceed low_freq_factor in {rope}")
    return sizes | {"rope_scaling": RopeScaling(**scaling)}


def _count(settings: Any, key: str, source: str) -> int:
    return _natural(getattr(settings, key, None), key, source)


def _natural(value: Any, key: str, source: str) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise InputError(f"{source}: {key} is {value!r}, expected a number from 1 to 2^31 - 1")
    return value


def _number(value: Any, key: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise InputError(f"{source}: {key} is {value!r}, expected a positive number")
    return float(value)


def _switch(settings: Any, key: str, source: str) -> bool:
    value = getattr(settings, key, None)
    if type(value) is not bool:
        raise InputError(f"{source}: {key} is {value!r}, expected true or false")
    return value
