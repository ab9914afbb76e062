"""Model types that read images: a language model of another type, and a vision part before it.

`config.json` has both. The text model is read like every other one (families.py). The vision part
is transformers' own module, which takes its settings from the same file, so that its keys are not
interpreted here. Vision parts that are not tested are refused.

Names of tensors have changed with transformers. The files of all versions are read:

    language_model.model.layers.0.…     model.language_model.layers.0.…     the text model
    language_model.lm_head.weight       lm_head.weight
    vision_tower.…                      model.vision_tower.…                the vision part

Inside, the text model has the names of a model without images, `model.layers.0.…` and `lm_head`,
and the vision part those that its module has. Files are written as `save_pretrained` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.family import Family
from megatron_prefix.model.hf.keys import NO_EFFECT, Only

_TEXT_STARTS = re.compile(r"(?:model\.)?language_model\.model\.|model\.language_model\.")
_HEAD_START = "language_model.lm_head."
_VISION_START = re.compile(
    r"model\.(?=(?:vision_tower|multi_modal_projector|image_newline|visual)\b)"
)
_INNER_TOWER = "vision_tower.vision_model."
"""In older files, what `vision_tower.` is in newer ones."""


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """A model type that reads images."""

    text_types: tuple[str, ...]
    """Types of text models; the first is that of files that name none."""
    towers: tuple[str, ...]
    """Types of vision towers."""
    projector: tuple[str, ...]
    """Starts of the names of parameters between tower and language model."""
    prefix: str
    """What `save_pretrained` puts before the names of the text model's tensors."""
    read: frozenset[str]
    """Keys besides those of the text model."""
    only: Mapping[str, Only]
    has_axes: bool = False
    """Whether positions have three axes."""

    def file_name(self, name: str) -> str:
        """The name in a file of a tensor."""
        is_text = name.startswith(("model.", "lm_head."))
        return f"{self.prefix}{name}" if is_text else name

    @staticmethod
    def own_name(stored: str) -> str:
        """The name of a tensor, from that in a file of any version."""
        if stored.startswith(_HEAD_START):
            return stored.removeprefix("language_model.")
        name = _VISION_START.sub("", _TEXT_STARTS.sub("model.", stored, count=1), count=1)
        if name.startswith(_INNER_TOWER):
            return f"vision_tower.{name.removeprefix(_INNER_TOWER)}"
        return name

    def is_projector(self, name: str) -> bool:
        """Whether a parameter of the vision part is one of the projector."""
        return name.startswith(self.projector)


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OUTER = _keys("model_type architectures tie_word_embeddings pad_token_id eos_token_id")
"""Keys of the whole model that each of them has."""
_LLAVA = _keys(
    """
    text_config vision_config image_token_index image_token_id projector_hidden_act
    vision_feature_select_strategy vision_feature_layer multimodal_projector_bias
    """
)
TEXT_PARTS: dict[str, Family] = {
    "qwen2_5_vl_text": Family(
        architecture="Qwen2_5_VLForConditionalGeneration",
        qkv_bias=True,
        window="layer_types",
        rotary_sections=True,
        read=_keys("sliding_window use_sliding_window max_window_layers layer_types"),
        no_effect=_keys(
            """
            attention_bias image_token_id video_token_id vision_token_id vision_start_token_id
            vision_end_token_id
            """
        ),
    ),
}
"""Text models that are no model by themselves."""
IMAGE_FAMILIES: dict[str, ImageFamily] = {
    "llava": ImageFamily(
        text_types=("llama", "mistral", "qwen2"),
        towers=("clip_vision_model", "siglip_vision_model"),
        projector=("multi_modal_projector.",),
        prefix="language_model.",
        read=_LLAVA | _keys("image_seq_length ignore_index"),
        only={},
    ),
    "llava_onevision": ImageFamily(
        text_types=("qwen2",),
        towers=("siglip_vision_model",),
        projector=("multi_modal_projector.", "image_newline"),
        prefix="language_model.",
        read=_LLAVA
        | _keys("video_token_index video_token_id vision_aspect_ratio image_grid_pinpoints")
        | _keys("ignore_index"),
        only={"use_image_newline_parameter": Only((True, None), "rows of patches end in one")},
    ),
    "qwen2_5_vl": ImageFamily(
        text_types=("qwen2_5_vl_text",),
        towers=("qwen2_5_vl_vision", "qwen2_5_vl"),
        projector=("visual.merger.",),
        prefix="",
        read=_keys(
            """
            text_config vision_config image_token_id video_token_id vision_token_id
            vision_start_token_id vision_end_token_id
            """
        ),
        only={},
        has_axes=True,
    ),
}


def text_of(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The text model's part of `config.json`; a model without images is one itself.

    Raises InputError naming a key or type that is not known.
    """
    kind = config.get("model_type")
    family = IMAGE_FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        return config
    tower = config.get("vision_config") or {}
    name = tower.get("model_type", family.towers[0]) if isinstance(tower, dict) else tower
    if name not in family.towers:
        raise InputError(
            f"{source}: vision_config.model_type = {name!r}: a vision tower of model_type {kind} "
            f"is {' or '.join(family.towers)} here"
        )
    for key, only in family.only.items():
        if config.get(key) not in only.values:
            raise InputError(f"{source}: {key} = {config[key]!r} is not supported: {only.reason}")
    own = family.read | family.only.keys()
    text = config.get("text_config")
    if text is None:  # older files have its keys beside those of the vision part
        return {key: x for key, x in config.items() if key not in own} | {
            "model_type": family.text_types[0]
        }
    if not isinstance(text, dict):
        raise InputError(f"{source}: text_config is {text!r}, expected an object")
    for key, value in config.items():
        # some versions repeat keys of the text model
        if key in own | _OUTER | NO_EFFECT or value is None or text.get(key) == value:
            continue
        raise InputError(
            f"{source}: {key} = {str(value)[:60]} is a key of model_type {kind} that is not known "
            "here, and may change what the model computes: if it does not, remove it from "
            "config.json"
        )
    text = {"model_type": family.text_types[0]} | text
    if text["model_type"] not in family.text_types:
        raise InputError(
            f"{source}: text_config.model_type = {text['model_type']!r}: the language model of "
            f"model_type {kind} is one of {', '.join(family.text_types)} here"
        )
    return text
