"""The vision tower of a Hugging Face model of images: its sizes, and the work of its pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_prefix.config.parts import PictureWork, VisionTower


def vision_tower(settings: Any) -> VisionTower:
    """The sizes of the tower of a configuration of a type of images.py."""
    tower, text = settings.vision_config, settings.text_config
    if settings.model_type == "qwen2_5_vl":
        merged = tower.spatial_merge_size**2
        joined = merged * tower.hidden_size
        return VisionTower(
            num_layers=tower.depth,
            hidden_size=tower.hidden_size,
            ffn_hidden_size=tower.intermediate_size,
            gated_linear_unit=True,
            patch_values=tower.in_channels * tower.temporal_patch_size * tower.patch_size**2,
            projector_sizes=(joined, joined, tower.out_hidden_size),
            merged_patches=merged,
            # whole merged tokens, as transformers rounds it
            window_patches=tower.window_size
            // tower.spatial_merge_size
            // tower.patch_size
            * tower.spatial_merge_size,
            windowed_layers=tower.depth - len({*tower.fullatt_block_indexes}),
        )
    patches = (tower.image_size // tower.patch_size) ** 2
    has_class_token = tower.model_type == "clip_vision_model"
    without_first = settings.vision_feature_select_strategy == "default"
    layers = settings.vision_feature_layer
    chosen = 1 if isinstance(layers, int) else len(layers)
    return VisionTower(
        num_layers=tower.num_hidden_layers,
        hidden_size=tower.hidden_size,
        ffn_hidden_size=tower.intermediate_size,
        patch_values=tower.num_channels * tower.patch_size**2,
        projector_sizes=(chosen * tower.hidden_size, text.hidden_size, text.hidden_size),
        tile_patches=patches + has_class_token,
        class_tokens=int(has_class_token),
        projected_tile_patches=patches + has_class_token - without_first,
    )


def pictures_work(
    settings: Any, sizes: np.ndarray, grids: np.ndarray, several: np.ndarray
) -> list[PictureWork]:
    """The work of each picture; `sizes` [I, 2] are width and height in pixels, `grids` [I, 3] in
    tokens (of models whose pictures keep their shape), `several` [I] whether a picture is one of
    several of its prompt."""
    tower = vision_tower(settings)
    if settings.model_type == "qwen2_5_vl":
        return [tower.of_grid(*grid) for grid in grids.tolist()]
    if settings.model_type == "llava":
        return [tower.of_tiles(1)] * len(sizes)
    return [
        tower.of_tiles(1 if is_one_of_several else _num_tiles(settings, width, height))
        for (width, height), is_one_of_several in zip(sizes.tolist(), several, strict=True)
    ]


def _num_tiles(settings: Any, width: int, height: int) -> int:
    """Tiles of the only picture of a prompt, by LLaVA-OneVision: the whole one, and those of the
    resolution that fits it best."""
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )

    edge = settings.vision_config.image_size
    return int(image_size_to_num_patches((height, width), settings.image_grid_pinpoints, edge))
