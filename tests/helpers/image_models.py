"""Small random models of transformers that read images, and rows of trees with images.

Pictures are random pixels: what their processors do to real ones is tested with the data. Shapes: R
responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from megatron_prefix.data.steps.collate import MicroBatch, RowItem, collate_packed
from megatron_prefix.data.steps.row_images import RowImages
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import Pair, ResponsePath, build_tree
from megatron_prefix.model.vision import PixelBatch

FAMILIES = ("llava", "llava siglip", "llava_onevision", "qwen2_5_vl")
IMAGE, VOCAB, START, END = 90, 96, 91, 92
"""The placeholder; tokens of text are below it."""
TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
_TOWER: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)


def hf_model(family: str, seed: int = 0) -> Any:
    """A model of transformers with random weights, in float64 and evaluation mode."""
    tf = transformers
    torch.manual_seed(seed)
    if family.startswith("llava_onevision"):
        model: Any = tf.LlavaOnevisionForConditionalGeneration(
            tf.LlavaOnevisionConfig(
                vision_config=tf.SiglipVisionConfig(**_TOWER, vision_use_head=False),
                text_config=tf.Qwen2Config(**TEXT, tie_word_embeddings=True),
                image_token_id=IMAGE,
                video_token_id=IMAGE + 3,
                image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]],
            )
        )
    elif family.startswith("llava"):
        tower: Any = tf.CLIPVisionConfig(**_TOWER)
        strategy, layer = "default", -2
        if family == "llava siglip":
            tower = tf.SiglipVisionConfig(**_TOWER, vision_use_head=False)
            strategy, layer = "full", -1
        model = tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=tower,
                text_config=tf.LlamaConfig(**TEXT),
                image_token_id=IMAGE,
                vision_feature_select_strategy=strategy,
                vision_feature_layer=layer,
            )
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision = dict(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
        )
        model = tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(
                text_config={**TEXT, "rope_parameters": rope},
                vision_config=vision,
                image_token_id=IMAGE,
                video_token_id=IMAGE + 3,
                vision_start_token_id=START,
                vision_end_token_id=END,
            )
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1 and "norm" in name and "bias" not in name:
                parameter.add_(1)
    return model.double().eval()


@dataclass(frozen=True, eq=False)
class RandomPictures:
    """Pictures by number, as a family's processor would give them."""

    family: str
    images: list[dict[str, Tensor]]

    @classmethod
    def make(cls, family: str, num_images: int, seed: int = 3) -> RandomPictures:
        rng = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        images = []
        for number in range(num_images):
            if family == "llava_onevision":
                size, patches = [([8, 8], 2), ([8, 16], 3), ([14, 12], 5), ([5, 16], 3)][number % 4]
                image = {"pixel_values": noise(patches, 3, 8, 8), "image_sizes": _row(size)}
            elif family.startswith("llava"):
                image = {"pixel_values": noise(3, 8, 8)}
            else:
                height, width = [(2, 4), (6, 4), (4, 4), (2, 2)][number % 4]
                image = {
                    "pixel_values": noise(height * width, 3 * 2 * 4 * 4),
                    "image_grid_thw": _row([1, height, width]),
                }
            images.append(image)
        return cls(family, images)

    def pixels(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes of these pictures together."""
        own = [self.images[number] for number in numbers]
        values = [image["pixel_values"] for image in own]
        others = {
            name: torch.stack([image[name] for image in own])
            for name in own[0]
            if name != "pixel_values"
        }
        if self.family == "qwen2_5_vl":
            return {"pixel_values": torch.cat(values), **others}
        if self.family == "llava_onevision":
            most = max(len(x) for x in values)
            values = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in values]
            others["batch_num_images"] = torch.ones(len(own), dtype=torch.int64)
        return {"pixel_values": torch.stack(values), **others}

    def batches(self, images: np.ndarray, device: torch.device) -> tuple[PixelBatch, ...]:
        return (PixelBatch(tuple(range(len(images))), self.pixels(images.tolist())),)

    def num_tokens(self, model: Any) -> list[int]:
        """Features of each picture, by the model itself."""
        output = model.get_image_features(**self.pixels(range(len(self.images))), return_dict=True)
        return [len(x) for x in output.pooler_output]

    def grid(self, number: int) -> tuple[int, int, int]:
        if self.family != "qwen2_5_vl":
            return (0, 0, 0)
        _, height, width = self.images[number]["image_grid_thw"].tolist()
        return (1, height // 2, width // 2)


def _row(values: list[int]) -> Tensor:
    return torch.tensor(values)


@dataclass(frozen=True, eq=False)
class ImageGroup:
    """A prompt, in which negative tokens are images (-1 the first picture), and its responses."""

    prompt: list[int]
    responses: list[list[int]]


GROUPS = [
    ImageGroup([5, 6, -1, 7, -2, 8], [[11, 12, 13], [11, 14], [15, 16, 17, 18]]),
    ImageGroup([9, -2, 3], [[21, 22], [23]]),
    ImageGroup([31, 32, 33], [[34, 35], [36]]),
    ImageGroup([5, 6, -3, 7, -4, -3, 4], [[41, 42], [41, 43, 44]]),
]
"""Two images in a prompt, one that another group has too, none, and one that occurs twice."""


def expanded(
    tokens: list[int], lengths: Sequence[int], family: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens with placeholders, and (first token, picture) of each image. Qwen's are between two
    marks, as its chat template has them."""
    out: list[int] = []
    places: list[tuple[int, int]] = []
    for token in tokens:
        if token >= 0:
            out.append(token)
            continue
        marks = ([START], [END]) if family == "qwen2_5_vl" else ([], [])
        out += marks[0]
        places.append((len(out), -token - 1))
        out += [IMAGE] * lengths[-token - 1] + marks[1]
    return out, places


def image_row(
    groups: Sequence[ImageGroup],
    pictures: RandomPictures,
    lengths: Sequence[int],
    multiple: int = 1,
) -> MicroBatch:
    """The groups in one row, each of which encodes an image once."""
    items, places = [], []
    for number, group in enumerate(groups):
        prompt, own = expanded(group.prompt, lengths, pictures.family)
        paths = [
            ResponsePath(tokens=np.array(prompt + response), loss_start=len(prompt))
            for response in group.responses
        ]
        one = view(build_tree(paths, [Pair(chosen=0, rejected=1)]), "tree", 0)
        items.append(RowItem(group=number, view=one, pair_weights=np.ones(1)))
        places.append(own)
    row = collate_packed(items, multiple)
    roots = row.layout.starts[row.layout.parents < 0]
    occurrences: list[tuple[int, int, int]] = []
    encoded_ids: list[int] = []
    for root, own in zip(roots, places, strict=False):  # padding is a root, too
        first = len(encoded_ids)
        encoded_ids += dict.fromkeys(picture for _, picture in own)
        occurrences += [
            (int(root) + place, picture, encoded_ids.index(picture, first))
            for place, picture in own
        ]
    starts, ids, encoded = np.array(occurrences, np.int64).reshape(-1, 3).T
    images = RowImages(
        starts=starts,
        lengths=np.array(lengths, np.int64)[ids],
        ids=ids,
        grids=np.array([pictures.grid(x) for x in ids], np.int64).reshape(-1, 3),
        encoded=encoded,
        encoded_ids=np.array(encoded_ids, np.int64),
    )
    return replace(row, images=images)


def alone_logps(
    model: Any, groups: Sequence[ImageGroup], pictures: RandomPictures, lengths: Sequence[int]
) -> Tensor:
    """Log-probability of every response by transformers, each sequence alone, float64 [R]."""
    logps = []
    for group in groups:
        prompt, places = expanded(group.prompt, lengths, pictures.family)
        for response in group.responses:
            ids = torch.tensor([prompt + response])
            extra: dict[str, Tensor] = {}
            if places:
                extra = pictures.pixels([picture for _, picture in places])
            if pictures.family == "qwen2_5_vl":
                extra["mm_token_type_ids"] = (ids == IMAGE).int()
            logits = model(input_ids=ids, **extra).logits[0].double().log_softmax(-1)
            picked = logits[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            logps.append(picked.sum())
    return torch.stack(logps)


def save(model: Any, folder: Path) -> Path:
    """The model's directory, in float32."""
    model.float().save_pretrained(folder)
    return folder
