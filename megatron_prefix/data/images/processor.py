"""The image half of a vision model's processor: placeholder tokens of a picture, and its pixels.

`AutoProcessor` needs torchvision for models that also read films. This class needs only the image
processor, in its version for Pillow: so pixels are the same on every machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.images.counting import (
    Count,
    count_llava,
    count_onevision,
    count_qwen,
    scaled,
)
from megatron_prefix.errors import InputError, Stopped
from megatron_prefix.text import counted

IMAGE_SETTINGS, PROCESSOR_SETTINGS = "preprocessor_config.json", "processor_config.json"
PLACEHOLDERS = {"llava": "<image>", "llava_onevision": "<image>", "qwen2_5_vl": "<|image_pad|>"}
"""The families, with the text of the token that means an image if the files name none."""
FILMS = {"llava_onevision": "<video>", "qwen2_5_vl": "<|video_pad|>"}
WRITTEN = {"qwen2_5_vl": "<|vision_start|>{}<|vision_end|>"}
"""What the family's chat templates write around an image."""
PROCESSORS = {
    "LlavaProcessor": "llava",
    "LlavaOnevisionProcessor": "llava_onevision",
    "Qwen2_5_VLProcessor": "qwen2_5_vl",
}
"""Families by the class of their processor, for directories without a config.json."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "llava": {
        "patch_size": None,
        "vision_feature_select_strategy": None,
        "num_additional_image_tokens": 0,
    },
    "llava_onevision": {
        "num_image_tokens": None,
        "vision_feature_select_strategy": None,
        "vision_aspect_ratio": "anyres_max_9",
    },
    "qwen2_5_vl": {},
}
"""Settings of each family's processor that decide how many tokens an image has."""
NOT_PIXELS = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "backend",
    "return_tensors",
    "data_format",
    "input_data_format",
    "device",
    "disable_grouping",
    "num_additional_image_tokens",
)
"""Settings of an image processor that change no pixel."""


class ImageProcessor:
    """The image processor of a model directory.

    `family` is the model type, `image_token` the text of the placeholder, `image_token_id` its id,
    `film_token` that of films, which are not supported, or "". `image_text` is how a text without a
    chat template has an image.
    """

    def __init__(
        self,
        directory: Path,
        family: str,
        images: Any,
        settings: Mapping[str, Any],
        token: tuple[str, int],
    ) -> None:
        self.directory, self.family = directory, family
        self.image_token, self.image_token_id = token
        self.film_token = FILMS.get(family, "")
        self.image_text = WRITTEN.get(family, "{}").format(self.image_token)
        self._images, self._settings = images, dict(settings)

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Whether a directory has the settings of an image processor."""
        path = Path(directory)
        return (path / IMAGE_SETTINGS).is_file() or "image_processor" in _read(
            path / PROCESSOR_SETTINGS
        )

    @staticmethod
    def supports(directory: str | Path) -> bool:
        """Whether a directory has an image processor, of a family that is supported."""
        try:
            return ImageProcessor.exists(directory) and bool(family_of(Path(directory)))
        except InputError:
            return False

    @staticmethod
    def chat_template(directory: str | Path) -> str | None:
        """The chat template of a processor, from the file that transformers takes; None for none.

        It is also that of the tokenizer, unless the directory is of an older form.
        """
        path = Path(directory)
        for name in (PROCESSOR_SETTINGS, "chat_template.json"):
            template = _read(path / name).get("chat_template")
            if isinstance(template, str):
                return template
        file = path / "chat_template.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @staticmethod
    def tokens(directory: str | Path) -> tuple[str, str]:
        """The texts that mean an image and a film, of a supported directory."""
        path = Path(directory)
        family = family_of(path)
        return image_token_of(path, family), FILMS.get(family, "")

    @classmethod
    def open(cls, directory: str | Path) -> ImageProcessor:
        """The image processor of a directory. Raises InputError if it has none, or if its model is
        of a family that is not supported."""
        path = Path(directory)
        if not cls.exists(path):
            raise InputError(
                f"{path} has no image processor ({IMAGE_SETTINGS}, or image_processor in "
                f"{PROCESSOR_SETTINGS}): give the directory of a vision model"
            )
        family = family_of(path)
        config, own = _read(path / "config.json"), _read(path / PROCESSOR_SETTINGS)
        with _explained(path):
            from transformers import AutoImageProcessor

            images = AutoImageProcessor.from_pretrained(
                str(path), backend="pil", trust_remote_code=False
            )
        settings = _settings(path, family, own, config)
        text = image_token_of(path, family)
        number = _token_id(path, text, config)
        processor = cls(path, family, images, settings, (text, number))
        _check_features(processor, config)
        _check_patches(processor, config)
        return processor

    @property
    def depends_on_number(self) -> bool:
        """Whether the only image of a prompt is treated otherwise than one of several."""
        return self.family == "llava_onevision"

    def tokens_of(self, width: int, height: int, among_several: bool = False) -> Count:
        """Placeholder tokens of an upright picture, and its grid. Raises InputError if a picture of
        this size cannot be scaled."""
        if self.family == "llava":
            return count_llava(self._images, self._settings, width, height)
        if self.family == "llava_onevision":
            return count_onevision(self._images, self._settings, width, height, among_several)
        return count_qwen(self._images, self._settings, width, height)

    def pixels(self, pictures: Sequence[Any], among_several: bool = False) -> dict[str, np.ndarray]:
        """What the image processor returns for upright RGB pictures, in their order.

        With `among_several` each of them is one of several images of its prompt. The arrays are the
        arguments of the model's `get_image_features`, as far as it has them.
        """
        given: Any = list(pictures)
        if self.depends_on_number:
            # A list of lists has one entry per prompt. A prompt of one image would be cut in tiles.
            given = [[picture] for picture in pictures]
            if among_several:
                given = [[*pictures, *pictures[:1]] if len(pictures) == 1 else list(pictures)]
        with _explained(self.directory, "cannot scale these pictures"):
            made = dict(self._images(images=given, return_tensors="np"))
        arrays = {name: np.asarray(values) for name, values in made.items()}
        if len(pictures) == 1 and self.depends_on_number and among_several:
            for name in ("pixel_values", "image_sizes"):
                arrays[name] = arrays[name][:1]
        return arrays

    def describe(self) -> dict[str, Any]:
        """The processor in a manifest: `fingerprint` is the SHA-256 of the settings that change
        pixels or numbers of tokens."""
        kind = type(self._images).__name__.removesuffix("Pil").removesuffix("Fast")
        settings = {
            name: value
            for name, value in json.loads(json.dumps(self._images.to_dict(), default=str)).items()
            if name not in NOT_PIXELS and not name.startswith("_")
        }
        entry = {
            "family": self.family,
            "kind": kind,
            "image_token_id": self.image_token_id,
            "settings": {**settings, **self._settings},
        }
        text = json.dumps(entry, sort_keys=True)
        return {**entry, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def family_of(directory: Path) -> str:
    """The family of a model directory. Raises InputError if it is not supported."""
    config, own = _read(directory / "config.json"), _read(directory / PROCESSOR_SETTINGS)
    name = config.get("model_type") or PROCESSORS.get(str(own.get("processor_class")), "")
    if name not in PLACEHOLDERS:
        known = name or own.get("processor_class") or "(none in config.json)"
        raise InputError(
            f"{directory}: images of model type {known} are not supported: give a model of one of "
            f"the types {', '.join(PLACEHOLDERS)}"
        )
    return str(name)


def image_token_of(directory: Path, family: str) -> str:
    """The text of the placeholder: as the tokenizer names it, or the processor, or the family."""
    tokenizer = _read(directory / "tokenizer_config.json")
    extra = tokenizer.get("extra_special_tokens")
    for source in (tokenizer, extra, _read(directory / PROCESSOR_SETTINGS)):
        value = source.get("image_token") if isinstance(source, dict) else None
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            return text
    return PLACEHOLDERS[family]


def _settings(
    path: Path, family: str, own: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """What counts tokens besides the image processor. Settings that the processor leaves out are
    those of the model's config.json."""
    tower = config.get("vision_config") or {}
    fallback = {
        "patch_size": tower.get("patch_size"),
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy"),
    }
    settings = {}
    for name, default in DEFAULTS[family].items():
        value = own.get(name)
        value = fallback.get(name) if value is None else value
        value = default if value is None else value
        if value is None:
            raise InputError(
                f"{path}/{PROCESSOR_SETTINGS} lacks {name!r}, which decides how many tokens an "
                "image has: copy the processor's files again"
            )
        settings[name] = value
    return settings


def _token_id(path: Path, text: str, config: Mapping[str, Any]) -> int:
    """The id of the placeholder, by config.json or by the tokenizer's file."""
    known = config.get("image_token_id", config.get("image_token_index"))
    tokenizer = _read(path / "tokenizer.json")
    named = {token.get("content"): token.get("id") for token in tokenizer.get("added_tokens", [])}
    number = named.get(text, known)
    if type(number) is not int:
        raise InputError(
            f"{path}: the tokenizer has no token {text!r}, which stands for an image: copy the "
            "tokenizer's files again"
        )
    if known is not None and known != number:
        raise InputError(
            f"{path}: the token {text!r} has id {number} in tokenizer.json, and images have "
            f"{known} in config.json: copy the files of one model"
        )
    return number


def _check_features(processor: ImageProcessor, config: Mapping[str, Any]) -> None:
    """Compare LLaVA's count with the features that its tower makes of a picture."""
    tower = config.get("vision_config") or {}
    size, patch = tower.get("image_size"), tower.get("patch_size")
    kind = tower.get("model_type")
    if processor.family != "llava" or kind not in ("clip_vision_model", "siglip_vision_model"):
        return
    if type(size) is not int or type(patch) is not int:
        return
    strategy = config.get("vision_feature_select_strategy", "default")
    features = (size // patch) ** 2 + (kind == "clip_vision_model") - (strategy == "default")
    tokens = processor.tokens_of(size, size).num_tokens
    if tokens != features:
        raise InputError(
            f"{processor.directory}: the processor puts {counted(tokens, 'token')} for an image, "
            f"and the model makes {features} features of it: correct patch_size, "
            "vision_feature_select_strategy or num_additional_image_tokens in "
            f"{PROCESSOR_SETTINGS}, or the size in the image processor's settings"
        )


def _check_patches(processor: ImageProcessor, config: Mapping[str, Any]) -> None:
    """Compare the patches and tiles of the image processor with those of the model, as far as
    config.json has them; with others the model fails, or reads pixels in another order."""
    images, tower = processor._images, config.get("vision_config") or {}
    pairs: dict[str, tuple[Any, Any]] = {}
    if processor.family == "qwen2_5_vl":
        pairs = {
            "patch_size": (images.patch_size, tower.get("patch_size")),
            "merge_size": (images.merge_size, tower.get("spatial_merge_size")),
            "temporal_patch_size": (images.temporal_patch_size, tower.get("temporal_patch_size")),
        }
    elif processor.family == "llava_onevision":
        tile, edge = list(scaled(images)), tower.get("image_size")
        pairs = {
            "size": (tile, None if edge is None else [edge, edge]),
            "image_grid_pinpoints": (
                _lists(images.image_grid_pinpoints),
                _lists(config.get("image_grid_pinpoints")),
            ),
        }
    for name, (ours, theirs) in pairs.items():
        if theirs is not None and ours != theirs:
            raise InputError(
                f"{processor.directory}: {name} of the image processor is {ours}, and the model in "
                f"config.json has {theirs}: copy the files of one model"
            )


def _lists(values: Any) -> Any:
    """Pairs as JSON has them, in order."""
    return None if values is None else sorted(list(pair) for pair in values)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one without the file. Raises InputError if it is
    damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): copy it again") from error
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _explained(path: Path, fault: str = "has an image processor that cannot be loaded") -> Iterator:
    """Turn whatever an image processor raises into an InputError."""
    try:
        yield
    except (InputError, Stopped):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} {fault} ({reason}): copy its files again") from error
