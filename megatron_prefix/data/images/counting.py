"""How many placeholder tokens an image has: each family's own rule.

llava            the patches of the scaled picture, the same for all pictures
llava_onevision  the patches of the whole picture, those of its tiles without their padding, and one
                 token at the end of each line; of several images only the whole pictures
qwen2_5_vl       patches of the picture, scaled to whole patches, merged by 2 x 2

The processors of transformers count the same way; tests compare them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_prefix.errors import InputError

NO_GRID = (0, 0, 0)


class Count(NamedTuple):
    """Placeholder tokens of an image; its time, height and width in them, or zeros."""

    num_tokens: int
    grid: tuple[int, int, int] = NO_GRID


def count_llava(images: Any, settings: Mapping[str, Any], width: int, height: int) -> Count:
    """`settings` are those of LlavaProcessor."""
    scaled_height, scaled_width = scaled(images)
    patch = settings["patch_size"]
    patches = (scaled_height // patch) * (scaled_width // patch)
    return Count(patches + settings["num_additional_image_tokens"] - _dropped(settings))


def count_onevision(
    images: Any, settings: Mapping[str, Any], width: int, height: int, among_several: bool
) -> Count:
    """`settings` are those of LlavaOnevisionProcessor."""
    whole = settings["num_image_tokens"]
    if among_several:
        return Count(whole + 1 - _dropped(settings))
    from transformers.image_processing_utils import select_best_resolution

    tile_height, tile_width = scaled(images)
    best = select_best_resolution((height, width), images.image_grid_pinpoints)
    side = math.isqrt(whole)
    lines, columns = side * (best[0] // tile_height), side * (best[1] // tile_width)
    lines, columns = _without_padding(lines, columns, width, height)
    most = int(settings["vision_aspect_ratio"].removeprefix("anyres_max_"))
    ratio = math.sqrt(lines * columns / (most * side**2))
    if ratio > 1.1:
        lines, columns = int(lines // ratio), int(columns // ratio)
    return Count(whole + lines * columns + lines - _dropped(settings))


def count_qwen(images: Any, settings: Mapping[str, Any], width: int, height: int) -> Count:
    """`images` is the image processor; Qwen2.5-VL's processor has no settings of its own."""
    resize = importlib.import_module(type(images).__module__).smart_resize
    factor = images.patch_size * images.merge_size
    limits = images.size["shortest_edge"], images.size["longest_edge"]
    try:
        scaled_height, scaled_width = resize(height, width, factor, *limits)
    except ValueError as error:
        raise InputError(
            f"an image of {width} x {height} pixels cannot be scaled ({error}): cut or pad it, or "
            "remove the record"
        ) from error
    lines, columns = scaled_height // factor, scaled_width // factor
    return Count(lines * columns, (1, lines, columns))


def _dropped(settings: Mapping[str, Any]) -> int:
    """Tokens of a tower's output that are left out: with `default`, that of the class."""
    return int(settings["vision_feature_select_strategy"] == "default")


def scaled(images: Any) -> tuple[int, int]:
    """Height and width of every picture after it was scaled."""
    size = dict(images.size or {})
    if getattr(images, "do_center_crop", False) and images.crop_size:
        size = dict(images.crop_size)
    edges = size.get("height") or size.get("shortest_edge"), size.get("width")
    height, width = edges[0], edges[1] or size.get("shortest_edge")
    if not height or not width:
        raise InputError(
            f"the image processor scales pictures to {size}: give one that scales all to one size"
        )
    return int(height), int(width)


def _without_padding(lines: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """Lines and columns of tokens that a picture fills, of those of its tiles."""
    if width / height > columns / lines:
        filled = int(round(height * (columns / width), 7))
        return lines - (lines - filled) // 2 * 2, columns
    filled = int(round(width * (lines / height), 7))
    return lines, columns - (columns - filled) // 2 * 2
