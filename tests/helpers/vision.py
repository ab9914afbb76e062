"""Directories of small vision models without weights; what transformers makes of their inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PLACES = {
    "llava": "<image>",
    "llava_onevision": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
"""What the chat template of each family writes for an image."""
SPECIAL = {
    "llava": ["<image>"],
    "llava_onevision": ["<image>", "<video>"],
    "qwen2_5_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
}
FAMILIES = tuple(PLACES)
SIDE, PATCH = 28, 7
PINPOINTS = [[SIDE * a, SIDE * b] for a in (1, 2, 3) for b in (1, 2, 3)]


def make(folder: Path, family: str, **changes: Any) -> Path:
    """A directory with tokenizer, image processor and config.json of a family; `changes` are
    settings of its image processor."""
    import transformers

    tokenizer = _tokenizer(SPECIAL[family])
    tokenizer.chat_template = TEMPLATE.replace("PLACE", PLACES[family])
    tokenizer.save_pretrained(folder)
    placeholder = PLACES[family].replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    config: dict[str, Any] = {
        "model_type": family,
        "image_token_id": tokenizer.convert_tokens_to_ids(placeholder),
    }
    own: dict[str, Any] = {}
    if family == "llava":
        images = transformers.CLIPImageProcessorPil(
            **{
                "size": {"shortest_edge": SIDE},
                "crop_size": {"height": SIDE, "width": SIDE},
                **changes,
            }
        )
        own = {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }
        tower = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH}
        config |= {"vision_config": tower, "vision_feature_select_strategy": "default"}
    elif family == "llava_onevision":
        images = transformers.LlavaOnevisionImageProcessorPil(
            **{
                "size": {"height": SIDE, "width": SIDE},
                "image_grid_pinpoints": PINPOINTS,
                **changes,
            }
        )
        own = {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (SIDE // PATCH) ** 2,
            "vision_feature_select_strategy": "full",
        }
    else:
        images = transformers.Qwen2VLImageProcessorPil(
            **{"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 12, **changes}
        )
    images.save_pretrained(folder)
    if own:
        (folder / "processor_config.json").write_text(json.dumps(own))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tokenizer(special: list[str]) -> Any:
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate([*alphabet, "<pad>", "<eos>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=special,
    )


class Reference:
    """What transformers' own processor makes of a text and its images.

    The processors of LLaVA-OneVision and Qwen2.5-VL need torchvision for their films. So the first
    is made without them, and of the second only the image processor and the tokenizer are used.
    """

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers.processing_utils import ProcessorMixin

        self.family = json.loads((folder / "config.json").read_text())["model_type"]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        if self.family == "llava":
            self.processor = transformers.AutoProcessor.from_pretrained(folder)
        elif self.family == "llava_onevision":
            settings = json.loads((folder / "processor_config.json").read_text())

            class WithoutFilms(transformers.LlavaOnevisionProcessor):
                def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
                    self.num_image_tokens = settings["num_image_tokens"]
                    self.vision_feature_select_strategy = settings["vision_feature_select_strategy"]
                    self.vision_aspect_ratio = "anyres_max_9"
                    self.image_token = "<image>"
                    self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
                    ProcessorMixin.__init__(
                        self, image_processor, tokenizer, chat_template=chat_template
                    )

            self.processor = WithoutFilms(self.images, self.tokenizer, self.tokenizer.chat_template)

    def __call__(self, text: str, pictures: list[Any]) -> tuple[list[int], dict[str, np.ndarray]]:
        """Token ids of the text, and pixels; all images belong to one prompt."""
        if self.family != "qwen2_5_vl":
            given = {"images": [pictures]} if pictures else {}
            made = self.processor(text=[text], add_special_tokens=False, **given)
            pixels = {n: np.asarray(v) for n, v in made.items() if n in self._pixel_names}
            return list(made["input_ids"][0]), pixels
        pixels = dict(self.images(images=pictures, return_tensors="np")) if pictures else {}
        parts = text.split("<|image_pad|>")
        assert len(parts) == len(pictures) + 1
        whole = parts[0]
        for grid, part in zip(pixels.get("image_grid_thw", []), parts[1:], strict=True):
            whole += "<|image_pad|>" * (int(grid.prod()) // 4) + part
        return self.tokenizer(whole, add_special_tokens=False)["input_ids"], pixels

    _pixel_names = ("pixel_values", "image_sizes", "batch_num_images")

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)


def picture(width: int, height: int, seed: int = 0) -> Any:
    """A drawn picture: a gradient, with an ellipse and some noise."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, np.full_like(x, 40 * (seed % 6))], axis=2)
    pixels += rng.integers(0, 20, pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    low = width // 4, height // 4
    box = (*low, max(low[0], 3 * width // 4), max(low[1], 3 * height // 4))
    ImageDraw.Draw(image).ellipse(box, fill=(250, 20 * (seed % 12), 10))
    return image
