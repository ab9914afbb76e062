"""Random models of images for benchmarks, with byte tokens, and pairs with RLHF-V's lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXT = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
"""The language model: size `small` of the other benchmarks."""
PROMPT, RESPONSE = 30, (60, 120)
"""Text tokens of a prompt, and of a response from and to: RLHF-V's."""


@dataclass(frozen=True)
class Shape:
    """A kind of model, its tower, and the pictures that it is given."""

    tower: dict
    picture: tuple[int, int]
    """Width and height in pixels."""
    pairs: int
    """In a step."""


SHAPES = {
    "LLaVA-1.5": Shape(
        tower={
            "image_size": 336,
            "patch_size": 14,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        picture=(500, 375),
        pairs=6,
    ),
    "LLaVA-OneVision": Shape(
        tower={
            "image_size": 384,
            "patch_size": 14,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "vision_use_head": False,
        },
        picture=(380, 380),
        pairs=3,
    ),
}
"""LLaVA-1.5 makes 576 tokens of a picture, whatever its size. LLaVA-OneVision makes 1485 of one
that fits a tile: the whole picture and the tile, 27 x 27 each, and 27 ends of rows."""


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: index for index, piece in enumerate([*alphabet, "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def write_model(directory: Path, name: str) -> None:
    """Write a random model of one of SHAPES with its processor."""
    torch.manual_seed(0)
    tokenizer, tower = _tokenizer(), SHAPES[name].tower
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**TEXT, **ends, "vocab_size": len(tokenizer)}
    image = tokenizer.convert_tokens_to_ids("<image>")
    if name == "LLaVA-1.5":
        size = tower["image_size"]
        pixels = transformers.CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        processor = transformers.LlavaProcessor(
            image_processor=pixels,
            tokenizer=tokenizer,
            patch_size=tower["patch_size"],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
        settings = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**tower),
            text_config=transformers.LlamaConfig(**text),
            image_token_id=image,
        )
        model = transformers.LlavaForConditionalGeneration(settings)
    else:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        settings = transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**tower),
            text_config=transformers.Qwen2Config(**text),
            image_token_id=image,
        )
        # its processor's video half needs torchvision, which the CPU build of torch lacks
        LlavaOnevisionImageProcessorPil().save_pretrained(directory)
        counted = {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (tower["image_size"] // tower["patch_size"]) ** 2,
            "vision_feature_select_strategy": "full",
        }
        (directory / "processor_config.json").write_text(json.dumps(counted))
        tokenizer.chat_template = TEMPLATE
        processor = tokenizer
        model = transformers.LlavaOnevisionForConditionalGeneration(settings)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def write_pairs(folder: Path, name: str, num_pairs: int, seed: int = 0) -> Path:
    """Write pairs about drawn pictures, one for each, and return their file."""
    rng = np.random.default_rng(seed)
    width, height = SHAPES[name].picture

    def text(tokens: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), tokens))

    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        for index in range(num_pairs):
            picture = rng.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), np.uint8)
            Image.fromarray(picture).resize((width, height)).save(folder / f"{index}.png")
            content = [{"type": "image"}, {"type": "text", "text": text(PROMPT)}]
            sides = {
                side: [{"role": "assistant", "content": text(int(rng.integers(*RESPONSE)))}]
                for side in ("chosen", "rejected")
            }
            prompt = [{"role": "user", "content": content}]
            record = {"images": [f"{index}.png"], "prompt": prompt, **sides}
            file.write(json.dumps(record) + "\n")
    return path
