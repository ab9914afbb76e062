"""Whole directories of small random models that read images, data sets of drawn pictures, and what
transformers computes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import vision
from vision import PATCH, PINPOINTS, SIDE

from megatron_prefix.data.build import BuildOptions, build_dataset

SIZES = [(60, 40), (40, 60), (56, 56), (100, 50), (30, 30)]
NAMES = ["a red ball", "a green hill", "two lamps", "an old door", "one cat", "no light"]
_TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
_TOWER: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
)


def make_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A directory with processor, tokenizer and weights; `changes` are settings of the image
    processor."""
    tf = transformers
    vision.make(folder, family, **changes)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    number = tokenizer.convert_tokens_to_ids
    text = {
        **_TEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "llava":
        config: Any = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**_TOWER),
            text_config=tf.LlamaConfig(**text),
            image_token_id=number("<image>"),
        )
    elif family == "llava_onevision":
        config = tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(**_TOWER, vision_use_head=False),
            text_config=tf.Qwen2Config(**text, tie_word_embeddings=True),
            image_token_id=number("<image>"),
            video_token_id=number("<video>"),
            image_grid_pinpoints=PINPOINTS,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = tf.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config=dict(
                depth=2,
                hidden_size=16,
                intermediate_size=24,
                num_heads=2,
                out_hidden_size=32,
                patch_size=14,
                window_size=56,
                fullatt_block_indexes=[1],
            ),
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def records(folder: Path, count: int = 6) -> Path:
    """JSON Lines of pairs about pictures: one image, two of them, and none."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(SIZES):
        vision.picture(*size, seed=number).save(folder / f"{number}.png")
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            images = [f"{number % len(SIZES)}.png"]
            images += [f"{(number + 2) % len(SIZES)}.png"] if number % 4 == 3 else []
            images = [] if number == 2 else images
            parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
            parts.append({"type": "text", "text": f"What is in picture {number}?"})
            answers = [NAMES[number % 6], NAMES[(number + 2) % 6]]
            record = {
                "images": images,
                "prompt": [{"role": "user", "content": parts}],
                "chosen": [{"role": "assistant", "content": f"I see {answers[0]} here."}],
                "rejected": [{"role": "assistant", "content": f"It is {answers[1]}."}],
            }
            if not images:
                del record["images"]
            file.write(json.dumps(record) + "\n")
    return path


def build(model: Path, path: Path, output: Path) -> str:
    """PREFIX of a data set of these records."""
    build_dataset([path], str(model), output, BuildOptions())
    return str(output)


def their_logps(model: Path, path: Path, weights: Path | None = None) -> list[float]:
    """Log-probability of every response by transformers, each sequence alone; of the `weights` in
    another directory."""
    from PIL import Image

    reference = vision.Reference(model)
    hf = transformers.AutoModelForImageTextToText.from_pretrained(
        weights or model, dtype=torch.float32
    ).eval()
    logps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        pictures = [Image.open(path.parent / x).convert("RGB") for x in record.get("images", [])]
        prompt = reference.render(record["prompt"], add_generation_prompt=True)
        start = len(reference(prompt, pictures)[0])
        for side in ("chosen", "rejected"):
            text = reference.render(record["prompt"] + record[side])
            tokens, pixels = reference(text, pictures)
            ids = torch.tensor([tokens])
            given = {name: torch.from_numpy(x) for name, x in pixels.items()}
            if reference.family == "qwen2_5_vl":
                image = reference.tokenizer.convert_tokens_to_ids("<|image_pad|>")
                given["mm_token_type_ids"] = (ids == image).int()
            with torch.no_grad():
                logits = hf(input_ids=ids, **given).logits[0, :-1].double().log_softmax(-1)
            logps.append(float(logits.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
    return logps
