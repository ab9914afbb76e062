"""Positions with three axes along root paths: the same as transformers' for every path alone."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from megatron_prefix.layout import TreeLayout
from megatron_prefix.model.vision import axis_positions

IMAGE = 9


def test_the_worked_example():
    layout = TreeLayout.from_parents([8, 2, 1], [-1, 0, 0])
    axes = axis_positions(layout, np.array([1]), np.array([6]), np.array([[1, 2, 3]]))
    assert axes.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 5],
    ]


def test_without_images_positions_are_depths():
    layout = TreeLayout.from_parents([2, 1, 2, 3], [-1, 0, 0, -1])
    none = np.zeros(0, np.int64)
    axes = axis_positions(layout, none, none, none.reshape(0, 3))
    assert (axes == layout.position_ids()).all()


def random_row(rng) -> tuple[TreeLayout, list[tuple[int, tuple[int, int, int]]]]:
    """A forest, each segment of which has text and images, and the images."""
    lengths, parents, images, token = [], [], [], 0
    open_segments: list[int] = []
    for segment in range(rng.integers(1, 8)):
        keep = int(rng.integers(0, len(open_segments) + 1))
        open_segments = open_segments[:keep]
        parents.append(open_segments[-1] if open_segments else -1)
        start = token
        for _ in range(rng.integers(1, 4)):
            token += int(rng.integers(1, 4))
            if rng.random() < 0.5:
                grid = (1, *(int(x) for x in rng.integers(1, 5, 2)))
                images.append((token, grid))
                token += int(np.prod(grid)) + 1  # two images are never side by side
        lengths.append(token - start)
        open_segments.append(segment)
    return TreeLayout.from_parents(lengths, parents), images


def test_every_root_path_has_the_positions_of_transformers():
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=16,
            num_hidden_layers=0,
            vocab_size=16,
            bos_token_id=1,
            eos_token_id=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        vision_config=dict(depth=0, hidden_size=16, num_heads=2, out_hidden_size=16),
    )
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLModel(config)
    rng = np.random.default_rng(5)
    checked = 0
    for _ in range(60):
        layout, images = random_row(rng)
        grids = np.array([grid for _, grid in images], np.int64).reshape(-1, 3)
        starts = np.array([start for start, _ in images], np.int64)
        axes = axis_positions(layout, starts, grids.prod(axis=1), grids)
        tokens = np.zeros(layout.num_tokens, np.int64)
        for start, grid in images:
            tokens[start : start + int(np.prod(grid))] = IMAGE
        for segment in range(layout.num_segments):
            path, own = [], segment
            while own >= 0:
                path.insert(0, own)
                own = int(layout.parents[own])
            index = np.concatenate(
                [np.arange(layout.starts[s], layout.starts[s] + layout.lengths[s]) for s in path]
            )
            own_grids = [grid for start, grid in images if start in set(index.tolist())]
            ids = torch.from_numpy(tokens[index])[None]
            merged = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in own_grids])
            theirs, _ = model.get_rope_index(
                ids, (ids == IMAGE).int(), image_grid_thw=merged.reshape(-1, 3)
            )
            assert (theirs[:, 0].numpy() == axes[:, index]).all()
            checked += len(own_grids) > 0
    assert checked > 50
