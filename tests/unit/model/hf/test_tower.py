"""A vision tower's operations by formula are those that torch counts in transformers' model."""

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from megatron_prefix.model.hf.tower import pictures_work

TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1}
LAYERS = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "image_size": 28}
LAYERS |= {"num_attention_heads": 2, "patch_size": 7}


def clip(**changes):
    tower = transformers.CLIPVisionConfig(**LAYERS)
    text = transformers.LlamaConfig(**TEXT)
    settings = transformers.LlavaConfig(vision_config=tower, text_config=text, **changes)
    return settings, transformers.LlavaModel(settings)


def onevision():
    tower = transformers.SiglipVisionConfig(**LAYERS, vision_use_head=False)
    settings = transformers.LlavaOnevisionConfig(
        vision_config=tower,
        text_config=transformers.Qwen2Config(**TEXT),
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 84]],
    )
    return settings, transformers.LlavaOnevisionModel(settings)


def qwen(window=56):
    tower = {"depth": 3, "hidden_size": 16, "intermediate_size": 40, "num_heads": 2}
    tower |= {"out_hidden_size": 24, "window_size": window, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    settings = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=tower
    )
    return settings, transformers.Qwen2_5_VLModel(settings)


def counted(model, **inputs):
    model.set_attn_implementation("eager")  # torch does not count its fused attention on CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(**inputs)
    return counter.get_total_flops()


def formula(settings, width=1, height=1, grid=(0, 0, 0), several=False):
    columns = [[width, height]], [grid], [several]
    (work,) = pictures_work(settings, *map(np.array, columns))
    return work.tower + work.projector


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, [1, 2]])
def test_a_tile_with_a_class_token(strategy, layer):
    settings, model = clip(vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    pixels = torch.zeros(1, 3, 28, 28)
    assert formula(settings) == counted(model, pixel_values=pixels)


@pytest.mark.parametrize(("width", "height", "tiles"), [(28, 28, 2), (56, 28, 3), (84, 50, 7)])
def test_tiles_of_the_resolution_that_fits(width, height, tiles):
    settings, model = onevision()
    sizes = torch.tensor([[height, width]])
    pixels = torch.zeros(1, tiles, 3, 28, 28)
    assert formula(settings, width, height) == counted(
        model, pixel_values=pixels, image_sizes=sizes
    )


def test_one_of_several_pictures_has_one_tile():
    settings, model = onevision()
    inputs = {"pixel_values": torch.zeros(2, 1, 3, 28, 28), "batch_num_images": torch.tensor([2])}
    total = counted(model, image_sizes=torch.tensor([[50, 84], [28, 28]]), **inputs)
    assert formula(settings, 84, 50, several=True) * 2 == total


@pytest.mark.parametrize("window", [28, 56, 112])
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 3, 5), (1, 7, 4)])
def test_pictures_that_keep_their_shape(window, grid):
    settings, model = qwen(window)
    frames, height, width = grid
    patches = torch.zeros(4 * height * width, 3 * 2 * 14 * 14)
    sizes = torch.tensor([[frames, 2 * height, 2 * width]])
    assert formula(settings, grid=grid) == counted(
        model, pixel_values=patches, image_grid_thw=sizes
    )
