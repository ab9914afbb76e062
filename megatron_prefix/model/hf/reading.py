"""One reading of a model's directory: the configuration that transformers makes of it.

Defaults, old spellings and what one key does to another are transformers' business, and change
with its version. So `config.json` is not interpreted here: `AutoConfig` reads it, as it does when
the model is loaded with transformers. The file itself is only searched for keys that are not
known (families.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.families import FAMILIES, WITH_STATE
from megatron_prefix.model.hf.family import Family
from megatron_prefix.model.hf.images import IMAGE_FAMILIES, TEXT_PARTS, text_of

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_EXPERTS = ("num_experts", "num_local_experts")
_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", *_EXPERTS),
)
_NOT_CODE = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor")
"""Entries of `auto_map` that do not concern the model."""


def read_json(directory: Path) -> dict[str, Any]:
    """`config.json` of a directory, as it is. Raises InputError."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        refuse_adapter(directory)
        raise InputError(
            f"{path}: {error.strerror}; give a Hugging Face model's directory"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}): fetch the model again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a Hugging Face model's configuration")
    return config


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory with an adapter: beside base weights, it is not clear which of the two is
    meant, and transformers would look for the base elsewhere."""
    for name in (ADAPTER, ADAPTER_WEIGHTS, "adapter_model.bin"):
        if not (directory / name).is_file():
            continue
        weights = sorted(directory.glob("model*.safetensors"))
        beside = f" beside the weights {weights[0].name}" if weights else ""
        raise InputError(
            f"{directory}: there is an adapter, {name}{beside}: merge it into its base model first "
            "(PEFT's merge_and_unload, then save_pretrained), or give the directory of the base "
            f"model as model.hf, without the adapter, and lora.adapter: {directory}"
        )


def family_of(config: dict[str, Any], source: str) -> Family:
    """The family that a `config.json` names, after a check of all its keys.

    Raises InputError naming `source` and the key for a type, a key or code that is not known.
    """
    kind = config.get("model_type")
    _refuse_code(config, source)
    if isinstance(kind, str) and kind in IMAGE_FAMILIES:
        text = text_of(config, source)
        return _known_family(text, text["model_type"], source)
    if isinstance(kind, str) and kind in WITH_STATE:
        raise InputError(
            f"{source}: model_type {kind!r} is not supported: it has layers with a state that goes "
            "from token to token (Mamba, gated delta rule, linear attention or convolution). At "
            "each branch point of a tree the state would have to be saved for every branch, which "
            "is not done yet: train it elsewhere, without prefix sharing"
        )
    if isinstance(config.get("text_config"), dict) and kind not in FAMILIES:
        text = config["text_config"].get("model_type")
        raise InputError(
            f"{source}: model_type {kind!r} is a model of several modalities, with a text model of "
            f"type {text!r} inside; of these only {', '.join(IMAGE_FAMILIES)} are read: save the "
            "text model by itself, docs/models.md shows how, and give its directory"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join((*FAMILIES, *IMAGE_FAMILIES))
        raise InputError(f"{source}: model_type {kind!r} is not supported; one of {known} is")
    return _known_family(config, kind, source)


def _known_family(config: dict[str, Any], kind: str, source: str) -> Family:
    """The family of a text model of this type, after a check of all its keys."""
    family = (FAMILIES | TEXT_PARTS)[kind]
    for key, value in config.items():
        if key not in family.known and key != "auto_map" and value is not None:
            raise InputError(
                f"{source}: {key} = {_short(value)} is a key of model_type {kind} that is not "
                "known here, and may change what the model computes: if it does not, remove it "
                "from config.json"
            )
    for key in _COUNTS:
        if config.get(key) is not None and type(config[key]) is not int:
            raise InputError(f"{source}: {key} is {_short(config[key])}, expected a number")
    numbers = {config[key] for key in _EXPERTS if type(config.get(key)) is int}
    if len(numbers) > 1:
        raise InputError(f"{source}: {' and '.join(_EXPERTS)} differ: {numbers}; remove one")
    return family


def read_settings(directory: Path, family: Family, source: str) -> Any:
    """The text model's part of what `AutoConfig` makes of the directory: a `PreTrainedConfig` with
    every default filled in.

    Raises InputError, naming the key if transformers does, for a configuration that transformers
    refuses, reads as another model type, or with a value that is not supported.
    """
    import transformers

    try:
        whole = transformers.AutoConfig.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
        settings = whole
        if whole.model_type in IMAGE_FAMILIES:
            settings = whole.text_config
            settings.tie_word_embeddings = whole.tie_word_embeddings  # the outer one is followed
        if isinstance(settings.rope_parameters, dict):
            settings.standardize_rope_params()  # as the model does when it is built
    except Exception as error:  # each key of each class may raise what it likes
        raise InputError(
            f"{source}: transformers {transformers.__version__} refuses it "
            f"({' '.join(f'{type(error).__name__}: {error}'.split())[:300]}): correct config.json"
        ) from None
    if (FAMILIES | TEXT_PARTS).get(settings.model_type) is not family:
        raise InputError(
            f"{source}: transformers reads it as model_type {settings.model_type}, which is not "
            "supported: its keys are those of another model type (layer_types of Ministral)"
        )
    for key, only in family.only.items():
        if (value := getattr(settings, key, None)) not in only.values and value is not None:
            raise InputError(f"{source}: {key} = {_short(value)} is not supported: {only.reason}")
    return settings


def _refuse_code(config: dict[str, Any], source: str) -> None:
    """A model whose directory brings its own code is another model without it."""
    auto_map = config.get("auto_map") or {}
    names = auto_map if isinstance(auto_map, dict) else {"auto_map": auto_map}
    for name, code in names.items():
        if name not in _NOT_CODE:
            raise InputError(
                f"{source}: auto_map.{name} = {_short(code)}: the model needs its own code, and "
                "code of a model is never run: if transformers' own class is meant, remove "
                "auto_map from config.json"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
