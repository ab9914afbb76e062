"""Placeholder tokens and pixels are those of transformers' processors, for sizes of all kinds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import vision

from megatron_prefix.data.images import ImageProcessor
from megatron_prefix.errors import InputError

SIZES = [
    (28, 28),
    (1, 1),
    (1, 150),
    (190, 1),
    (27, 29),
    (84, 56),
    (40, 120),
    (300, 60),
    (333, 512),
    (85, 84),
    (29, 57),
    (14, 70),
]
SETS = [[0], [1], [2], [3], [8], [4, 5], [6, 7, 6], [9, 10, 11, 0]]
"""Prompts: the sizes of their images."""


@pytest.fixture(scope="module", params=vision.FAMILIES)
def directory(request, tmp_path_factory):
    return vision.make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("sizes", SETS, ids=str)
def test_counts_and_pixels_are_those_of_transformers(directory, sizes):
    reference, processor = vision.Reference(directory), ImageProcessor.open(directory)
    pictures = [vision.picture(*SIZES[i], seed=i) for i in sizes]
    place = vision.PLACES[processor.family]
    ids, expected = reference("".join(f"{place} {i}" for i in sizes), pictures)
    several = processor.depends_on_number and len(sizes) > 1
    counts = [processor.tokens_of(*SIZES[i], several) for i in sizes]
    assert ids.count(processor.image_token_id) == sum(count.num_tokens for count in counts)
    pixels = processor.pixels(pictures, several)
    assert expected.keys() <= pixels.keys() and "pixel_values" in pixels
    for name, values in expected.items():
        np.testing.assert_array_equal(pixels[name], values, err_msg=name)
    if processor.family == "qwen2_5_vl":
        grids = np.array([count.grid for count in counts]) * [1, 2, 2]
        np.testing.assert_array_equal(grids, pixels["image_grid_thw"])


def test_one_of_several_can_be_scaled_alone(tmp_path):
    processor = ImageProcessor.open(vision.make(tmp_path, "llava_onevision"))
    pictures = [vision.picture(50, 90), vision.picture(90, 30, 1)]
    both = processor.pixels(pictures, True)["pixel_values"]
    alone = processor.pixels(pictures[1:], True)["pixel_values"]
    np.testing.assert_array_equal(alone, both[1:])
    tiled = processor.pixels(pictures[1:])["pixel_values"]
    assert tiled.shape[1] > alone.shape[1] == 1


def test_the_fingerprint_is_that_of_what_changes_pixels_or_counts(tmp_path):
    first = ImageProcessor.open(vision.make(tmp_path / "a", "llava")).describe()
    again = ImageProcessor.open(vision.make(tmp_path / "b", "llava")).describe()
    other = ImageProcessor.open(vision.make(tmp_path / "c", "llava", image_mean=[0.5] * 3))
    assert first == again
    assert other.describe()["fingerprint"] != first["fingerprint"]
    own = json.loads((tmp_path / "b/processor_config.json").read_text())
    images = json.loads((tmp_path / "b/preprocessor_config.json").read_text())
    (tmp_path / "b/preprocessor_config.json").unlink()  # the newer layout: all in one file
    (tmp_path / "b/processor_config.json").write_text(
        json.dumps({**own, "image_processor": images})
    )
    assert ImageProcessor.open(tmp_path / "b").describe() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "images of model type gemma3 are not supported"),
        ({"image_token_id": 5}, "images have 5 in config.json"),
        ({"vision_feature_select_strategy": "full"}, "the model makes 17 features"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(tmp_path, change, message):
    vision.make(tmp_path, "llava")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        ImageProcessor.open(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2_5_vl", {"vision_config": {"patch_size": 7}}, "patch_size .* is 14, .* has 7"),
        (
            "qwen2_5_vl",
            {"vision_config": {"spatial_merge_size": 1}},
            "merge_size .* is 2, .* has 1",
        ),
        (
            "qwen2_5_vl",
            {"vision_config": {"temporal_patch_size": 1}},
            "temporal_patch_size .* is 2, .* has 1",
        ),
        (
            "llava_onevision",
            {"vision_config": {"image_size": 56}},
            r"size of the image processor is \[28, 28\], .* has \[56, 56\]",
        ),
        ("llava_onevision", {"image_grid_pinpoints": [[28, 28]]}, "image_grid_pinpoints of"),
    ],
)
def test_patches_that_are_not_those_of_the_model_are_refused(tmp_path, family, change, message):
    vision.make(tmp_path, family)
    ImageProcessor.open(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        ImageProcessor.open(tmp_path)


def test_a_directory_without_an_image_processor_is_refused(tmp_path):
    vision.make(tmp_path, "llava")
    (tmp_path / "preprocessor_config.json").unlink()
    assert not ImageProcessor.exists(tmp_path) and not ImageProcessor.supports(tmp_path)
    with pytest.raises(InputError, match="has no image processor"):
        ImageProcessor.open(tmp_path)


def test_a_picture_that_cannot_be_scaled_is_refused(tmp_path):
    processor = ImageProcessor.open(vision.make(tmp_path, "qwen2_5_vl"))
    with pytest.raises(InputError, match="an image of 1 x 300 pixels cannot be scaled"):
        processor.tokens_of(1, 300)
