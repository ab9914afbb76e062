"""Hugging Face's `config.json` -> the sizes of a model.

families.py has what differs between model types. The values are those of transformers (reading.py).
export.py writes such a file for a model that did not come from Hugging Face.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megatron_prefix.config import ModelSizes
from megatron_prefix.config.parts import Architecture, PictureWork, VisionTower
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.family import Family
from megatron_prefix.model.hf.images import IMAGE_FAMILIES, ImageFamily
from megatron_prefix.model.hf.latent import (
    dense_layers,
    read_latent,
    read_routing,
    score_scale,
)
from megatron_prefix.model.hf.reading import family_of, read_json, read_settings, refuse_adapter
from megatron_prefix.model.hf.rotary import FULL, SLIDING, check_layer_types, read_rotary
from megatron_prefix.model.hf.values import count, number, switch

REWARD = "ForSequenceClassification"
ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of activations, and ours."""
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
        """That of the text model. Raises InputError for a model type or a key that is not known."""
        return family_of(self.config, self.source)

    @property
    def images(self) -> ImageFamily | None:
        """What reads images; None: the model reads none."""
        return IMAGE_FAMILIES.get(self.config.get("model_type") or "")

    def image_part(self, device: Any) -> Any:
        """What makes features of images, on a torch device: transformers' own module, with
        undefined weights. Raises InputError."""
        from megatron_prefix.model.hf.image_part import image_part

        return image_part(self.directory, self.source, device)

    @cached_property
    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its parameters; none of a model that reads no images."""
        if self.images is None:
            return {}
        parameters = self.image_part("meta").named_parameters()
        return {name: tuple(parameter.shape) for name, parameter in parameters}

    @property
    def vision_tower(self) -> VisionTower:
        """The sizes of the part that reads images."""
        from megatron_prefix.model.hf.image_part import image_settings
        from megatron_prefix.model.hf.tower import vision_tower

        return vision_tower(image_settings(self.directory))

    def pictures_work(
        self, sizes: np.ndarray, grids: np.ndarray, several: np.ndarray
    ) -> list[PictureWork]:
        """The work of pictures in the part that reads images; see tower.py."""
        from megatron_prefix.model.hf.image_part import image_settings
        from megatron_prefix.model.hf.tower import pictures_work

        return pictures_work(image_settings(self.directory), sizes, grids, several)

    @cached_property
    def image_fingerprint(self) -> str:
        """Hash of the keys of `config.json` that the vision part is made from."""
        assert self.images is not None
        keys = sorted(self.images.read - {"text_config"})
        own = {key: self.config.get(key) for key in keys}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    @cached_property
    def settings(self) -> Any:
        """The configuration that transformers makes of the directory, of a model that reads images
        its text model's. Raises InputError."""
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
        return count(self.settings, "vocab_size", self.source)


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
    heads = count(settings, "num_attention_heads", source)
    groups = count(settings, "num_key_value_heads", source)
    hidden = count(settings, "hidden_size", source)
    latent = read_latent(settings, source) if family.latent else None
    if latent is not None:
        head_dim = latent.query_channels
    elif getattr(settings, "head_dim", None) is not None:
        head_dim = count(settings, "head_dim", source)
    else:
        head_dim = hidden // heads
    if heads % groups or head_dim % 2 or not head_dim:
        raise InputError(
            f"{source}: {heads} query heads over {groups} key-value heads of {head_dim} channels: "
            "heads must share key-value heads evenly, and have an even number of channels"
        )
    num_layers = count(settings, "num_hidden_layers", source)
    rotated = head_dim if latent is None else latent.rotated_channels
    rotary_sizes, parts = read_rotary(settings, family, rotated, num_layers, source)
    has_experts = family.experts is not None
    if latent is not None:
        parts |= {"latent": latent, "rotary_channels": latent.rotated_channels}
        parts["rotary"] = ("none",) * num_layers  # the layers rotate by themselves
        parts["softmax_scale"] = score_scale(settings, latent, source)
    if family.routing is not None:
        dense = dense_layers(settings, num_layers, source)
        has_experts = dense < num_layers
        if has_experts:
            parts |= {"dense_layers": dense, "routing": read_routing(settings, family, source)}
            shared = count(settings, "n_shared_experts", source)
            parts["shared_expert_size"] = shared * count(settings, "moe_intermediate_size", source)
    bias, norm = family.qkv_bias, family.qk_norm
    try:
        sizes = ModelSizes(
            num_layers=num_layers,
            hidden_size=hidden,
            ffn_hidden_size=count(settings, "intermediate_size", source),
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=head_dim,
            norm_epsilon=number(getattr(settings, family.epsilon), family.epsilon, source),
            add_qkv_bias=switch(settings, bias, source) if isinstance(bias, str) else bias,
            qk_layernorm=switch(settings, norm, source) if isinstance(norm, str) else norm,
            untie_embeddings_and_output_weights=not switch(settings, "tie_word_embeddings", source),
            architecture=_architecture(settings, family, parts, source),
            softmax_type="learnable" if family.sinks else "vanilla",
            attn_logit_softcapping=_softcap(settings, family, source),
            **_windows(settings, family, source),
            **rotary_sizes,
            **(_experts(settings, family, source) if has_experts else {}),
        )
    except ValidationError as error:
        raise InputError(_fault(error, source)) from None
    if faults := list(sizes.faults()):
        raise InputError(f"{source}: {faults[0]}")
    return sizes


def _architecture(
    settings: Any, family: Family, others: dict[str, Any], source: str
) -> Architecture:
    """The parts that all models of the family have, those that a key sets, and `others`."""
    parts = dict(others)
    for part, key in family.set_by.items():
        if Architecture.__dataclass_fields__[part].default is False:
            parts[part] = switch(settings, key.name, source)
        elif (value := getattr(settings, key.name, None)) is not None:
            parts[part] = number(value, key.name, source) ** key.power
    if family.head_norm_key and switch(settings, family.head_norm_key, source):
        parts["qk_norm"] = "by head"
    if family.shared_expert:
        parts["shared_expert_size"] = count(settings, family.shared_expert, source)
    if family.fixed_activation:
        return replace(family.parts, **parts, activation=family.fixed_activation)
    name = getattr(settings, family.activation, None)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(
            f"{source}: {family.activation} = {name!r} is not supported: one of "
            f"{', '.join(ACTIVATIONS)} is"
        )
    return replace(family.parts, **parts, activation=ACTIVATIONS[name])


def _softcap(settings: Any, family: Family, source: str) -> float | None:
    """Bound of attention's scores, in families that have one."""
    key = "attn_logit_softcapping"
    if key not in family.read or getattr(settings, key) is None:
        return None
    return number(getattr(settings, key), key, source)


def _windows(settings: Any, family: Family, source: str) -> dict[str, Any]:
    """The sliding window and the layers that have it, as Megatron-Core counts: a token sees
    `sliding_window` tokens, itself included, and so `sliding_window` - 1 before it."""
    kinds = None
    if family.window == "none":
        return {}
    if family.window == "layer_types":
        types = settings.layer_types or []
        check_layer_types(types, count(settings, "num_hidden_layers", source), source)
        if SLIDING not in types:
            return {}
        if getattr(settings, "use_sliding_window", True) is False:
            raise InputError(
                f"{source}: use_sliding_window is false, and layer_types has {SLIDING}: change one"
            )
        kinds = tuple(int(kind == SLIDING) for kind in types) if FULL in types else None
    elif settings.sliding_window is None:
        return {}
    window = count(settings, "sliding_window", source)
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": kinds}


def _fault(error: ValidationError, source: str) -> str:
    """The first value out of bounds, as a message."""
    fault = error.errors(include_url=False)[0]
    setting = ".".join(str(part) for part in fault["loc"])
    return f"{source}: {setting} = {str(fault['input'])[:100]}: {fault['msg']}"


def _experts(settings: Any, family: Family, source: str) -> dict[str, Any]:
    key = family.experts
    assert key is not None
    experts, topk = count(settings, key, source), count(settings, "num_experts_per_tok", source)
    if topk > experts:
        raise InputError(f"{source}: num_experts_per_tok is {topk}, above {key} = {experts}")
    is_qwen = hasattr(settings, "moe_intermediate_size")
    size = "moe_intermediate_size" if is_qwen else "intermediate_size"
    return {
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": count(settings, size, source),
        "moe_router_pre_softmax": is_qwen
        and (family.routing == "softmax" or not switch(settings, "norm_topk_prob", source)),
    }
