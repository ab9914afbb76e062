"""Adapters in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`.

PEFT keeps a layer's adapters apart, as here. Names go from one to the other part by part:

    decoder.layers.2.self_attention.linear_qkv.adapters.k_proj.lora_A
    base_model.model.model.layers.2.self_attn.k_proj.lora_A.weight

In a model that reads images the language model is a part, `model.language_model.layers.2.…`, and a
list of targets would also adapt layers of the vision tower with the same names. So `target_modules`
is then a pattern for the language model's layers only.

What an adapter's configuration asks for and this package does not compute is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_prefix.config.lora import LATENT_TARGETS, TARGETS, LoraConfig
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.reading import ADAPTER, ADAPTER_WEIGHTS
from megatron_prefix.model.names import (
    REWARD_HEAD,
    SAVED_EMBEDDING,
    SAVED_OUTPUT_LAYER,
    is_expert,
    layer_and_part,
)

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prefix.model.hf.files import HFTensors

PREFIX = "base_model.model."
_OUTER = {
    SAVED_EMBEDDING: f"{PREFIX}model.embed_tokens.weight",
    SAVED_OUTPUT_LAYER: f"{PREFIX}lm_head.weight",
    REWARD_HEAD: f"{PREFIX}{REWARD_HEAD}",
}
_TEXT_PART = re.compile(
    rf"{re.escape(PREFIX)}(?:model\.language_model|language_model\.model)\.|"
    rf"{re.escape(PREFIX)}language_model\.(?=lm_head\.)"
)
"""Before names of a language model that is a part, in versions of transformers."""
_PATTERN = re.compile(
    r"\.\*\\\.language_model\\\.(?:layers\\\.\(\?:([\d|]+)\)\\\.)?\.\*\\\.\(\?:([\w|]+)\)"
)
"""A pattern of targets that `_pattern_of` makes."""
_BLOCKS = {"self_attention": "self_attn", "mlp": "mlp"}
LANGUAGE_MODEL, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"
_HEADS = ("classifier", "score")
"""What PEFT adds to `modules_to_save` of a sequence classifier."""
_FULL_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
"""A target that is one module of one layer."""
_TAKEN = ("r", "lora_alpha", "use_rslora", "layers_to_transform")
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
        *("revision", "task_type", "target_modules", "modules_to_save", "lora_dropout", *_TAKEN),
        *("megatron_core", "runtime_config", "loftq_config", "qalora_group_size"),
    }
)
"""Keys that are read, or that change nothing of a trained adapter."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model's weights as they are."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's directory; `lora` has its settings."""

    directory: Path
    lora: LoraConfig
    dropout: float
    """With which it was trained; here it is trained without."""
    is_classifier: bool = False
    """Whether it belongs to a sequence classifier."""

    @classmethod
    def read(cls, directory: Path) -> PeftAdapter:
        """Read its configuration. Raises InputError naming the key that is not supported."""
        path = directory / ADAPTER
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}); give a PEFT directory") from None
        if not isinstance(config, dict):
            raise InputError(f"{path}: not a PEFT adapter's configuration")
        _refuse_unsupported(config, path)
        _check_types(config, path)
        layers = config.get("layers_to_transform")
        if isinstance(layers, int):
            config["layers_to_transform"] = [layers]
        _read_full_names(config, path)
        _read_pattern(config)
        saved = [name for name in config.get("modules_to_save") or [] if name not in _HEADS]
        try:
            lora = LoraConfig(
                **{key: config[key] for key in _TAKEN if config.get(key) is not None},
                target_modules=config.get("target_modules"),
                modules_to_save=tuple(saved) or None,
            )
        except (ValidationError, TypeError) as error:
            text = " ".join(str(error).split())[:300]
            raise InputError(
                f"{path}: not supported ({text}); target_modules may list "
                f"{', '.join((*TARGETS, *LATENT_TARGETS))}"
            ) from None
        return cls(
            directory,
            lora,
            config.get("lora_dropout") or 0.0,
            config.get("task_type") == CLASSIFIER,
        )

    @cached_property
    def tensors(self) -> HFTensors:
        """Its weights. Raises InputError."""
        from megatron_prefix.model.hf.files import HFTensors

        if not (self.directory / ADAPTER_WEIGHTS).is_file():
            raise InputError(
                f"{self.directory}: there is no {ADAPTER_WEIGHTS}, and nothing else is read "
                "(adapter_model.bin is a pickle, which could run code): save the adapter again "
                "with PEFT's save_pretrained"
            )
        return HFTensors(self.directory, ADAPTER_WEIGHTS, rename=own_name)

    @property
    def num_labels(self) -> int:
        """Scores of the reward head among its weights; 0 if there is none."""
        return self.tensors.shapes.get(_OUTER[REWARD_HEAD], (0,))[0]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse tensors other than those of `shapes`: canonical names, and whole shapes. A reward
        head may be missing. Raises InputError."""
        expected = {peft_name(name): tuple(shape) for name, shape in shapes.items()}
        for name, shape in expected.items():
            own = self.tensors.shapes.get(name)
            if own is None and name != _OUTER[REWARD_HEAD]:
                raise InputError(
                    f"{self.directory}: tensor {name} is missing, {ADAPTER} and the model ask for "
                    "it: give the base model that the adapter was trained on"
                )
            if own is not None and tuple(own) != shape:
                raise InputError(
                    f"{self.directory}: tensor {name} has shape {list(own)}, the model asks for "
                    f"{list(shape)}: give the base model that the adapter was trained on"
                )
        if surplus := sorted(set(self.tensors.shapes) - set(expected)):
            raise InputError(
                f"{self.directory}: tensor {surplus[0]} has no place in the adapters that "
                f"{ADAPTER} describes"
            )

    def part(self, name: str, axis: int | None, rank: int, ranks: int, size: int) -> Tensor | None:
        """A canonical parameter, or rank `rank`'s part of `ranks` along `axis`, where each has
        `size` entries; fewer if the whole tensor ends before. None if there is no such tensor."""
        stored = peft_name(name)
        if stored not in self.tensors.shapes:
            return None
        everything = slice(None)
        if axis is None:
            return self.tensors.read(stored)
        own = slice(rank * size, min((rank + 1) * size, self.tensors.shapes[stored][axis]))
        rows, columns = (own, everything) if axis == 0 else (everything, own)
        return self.tensors.read(stored, rows, columns)


def own_name(stored: str) -> str:
    """The name of a tensor as if its language model were the whole model."""
    match = _TEXT_PART.match(stored)
    if match is None:
        return stored
    start = PREFIX if match[0].endswith(f"{PREFIX}language_model.") else f"{PREFIX}model."
    return f"{start}{stored[match.end() :]}"


def part_name(name: str) -> str:
    """PEFT's name of a tensor in a model that reads images, from that of its text model."""
    return name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model.", 1)


def peft_name(name: str) -> str:
    """PEFT's name of a canonical trained parameter."""
    if name in _OUTER:
        return _OUTER[name]
    layer, part = layer_and_part(name)
    block, *_, target, factor = part.split(".")
    if is_expert(name):
        raise InputError(
            f"{name} is an adapter of an expert. transformers keeps all experts of a layer in one "
            "parameter, and PEFT's adapters of it are others, so these have no place in a PEFT "
            "directory: export the merged model with --merge"
        )
    return f"{PREFIX}model.layers.{layer}.{_BLOCKS[block]}.{target}.{factor}.weight"


def peft_config(
    lora: LoraConfig, is_classifier: bool, base: str | None, reads_images: bool = False
) -> dict[str, Any]:
    """`adapter_config.json` of adapters; `base` is the directory or Hub id of their base model."""
    alpha = lora.lora_alpha
    assert alpha is not None
    saved = [*(lora.modules_to_save or ()), *(_HEADS if is_classifier else ())]
    return {
        "peft_type": "LORA",
        "task_type": CLASSIFIER if is_classifier else LANGUAGE_MODEL,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": lora.use_rslora,
        "lora_dropout": lora.lora_dropout,
        "target_modules": _pattern_of(lora) if reads_images else list(lora.target_modules or ()),
        "layers_to_transform": None
        if reads_images or not lora.layers_to_transform
        else list(lora.layers_to_transform),
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _pattern_of(lora: LoraConfig) -> str:
    """The targets of a language model that is a part of a model, as a regular expression.

    Of q_proj and v_proj in the layers 0 and 2: `language_model`, `layers.(0 or 2)`, `(q_proj or
    v_proj)`, with anything in between.
    """
    layers = "|".join(map(str, lora.layers_to_transform or ()))
    inner = rf"layers\.(?:{layers})\." if layers else ""
    return rf".*\.language_model\.{inner}.*\.(?:{'|'.join(lora.target_modules or ())})"


def _read_pattern(config: dict[str, Any]) -> None:
    """Replace a pattern that `_pattern_of` made by the targets and layers."""
    targets = config.get("target_modules")
    match = _PATTERN.fullmatch(targets) if isinstance(targets, str) else None
    if match is not None:
        config["target_modules"] = match[2].split("|")
        if match[1]:
            config["layers_to_transform"] = [int(layer) for layer in match[1].split("|")]


def _read_full_names(config: dict[str, Any], path: Path) -> None:
    """Replace names of single modules in `target_modules`, `model.layers.2.mlp.up_proj`, by names
    of targets and layers. Raises InputError if layers have other targets than others."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        return
    full = [match for name in targets if (match := _FULL_NAME.fullmatch(name))]
    if not full or config.get("layers_to_transform") is not None:
        return
    by_layer: dict[int, set[str]] = {}
    for match in full:
        by_layer.setdefault(int(match[1]), set()).add(match[2])
    first = next(iter(by_layer.values()))
    if len(full) < len(targets) or any(names != first for names in by_layer.values()):
        raise InputError(
            f"{path}: target_modules names single modules of some layers, and all layers with "
            "adapters must have the same ones"
        )
    config["target_modules"] = sorted(first)
    config["layers_to_transform"] = sorted(by_layer)


def _check_types(config: dict[str, Any], path: Path) -> None:
    """What `LoraConfig` does not check. Raises InputError."""
    task, dropout, saved = (
        config.get(key) for key in ("task_type", "lora_dropout", "modules_to_save")
    )
    if task is not None and task not in (LANGUAGE_MODEL, CLASSIFIER):
        raise InputError(
            f"{path}: task_type = {str(task)[:80]!r} is not supported: an adapter is one of a "
            f"{LANGUAGE_MODEL} or a {CLASSIFIER} model"
        )
    is_number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
    if dropout is not None and not (is_number and 0 <= dropout < 1):
        raise InputError(
            f"{path}: lora_dropout = {str(dropout)[:80]!r}: it must be a number from 0 to below 1"
        )
    if saved is not None and not isinstance(saved, list):
        raise InputError(f"{path}: modules_to_save = {str(saved)[:80]!r}: it must be a list")


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type = {config.get('peft_type')!r}: only LORA is supported")
    for key, value in config.items():
        if key in _WITHOUT_EFFECT or not value or (key, value) == ("bias", "none"):
            continue
        if key == "init_lora_weights" and value in _PLAIN_STARTS:
            continue
        if key == "layers_pattern" and value in ("layers", ["layers"]):
            continue
        raise InputError(
            f"{path}: {key} = {str(value)[:80]!r} is not supported: it changes which adapters "
            "there are, or what they compute"
        )
