"""Steps on rows with images equal those of plain torch on separate sequences, by transformers."""

from __future__ import annotations

import pytest
import torch
from image_models import hf_model, save
from image_steps import our_steps, plain_steps

from megatron_prefix.model.hf import HFModel, WeightMap

EVERYTHING = {"freeze_tower": False}
CASES = [
    ("llava", EVERYTHING),
    pytest.param("llava siglip", EVERYTHING, marks=pytest.mark.slow),
    ("llava_onevision", EVERYTHING),
    ("qwen2_5_vl", EVERYTHING),
    pytest.param("llava", {}, marks=pytest.mark.slow),
    ("qwen2_5_vl", {}),
    ("llava_onevision", {"freeze_tower": False, "freeze_projector": True}),
    ("llava siglip", {"freeze_projector": True}),
]


def compare(folder, ours, theirs) -> None:
    """A bias of the tower's keys adds the same to all scores of a query, so that its gradient is
    rounding alone; it is not compared."""
    (our, weights), (plain, expected) = ours, theirs
    for own, other in zip(our, plain, strict=True):
        assert own == pytest.approx(other, rel=2e-4, abs=1e-6)
    source = HFModel.read(folder)
    names = WeightMap.of(source)
    for name, weight in weights.items():
        for tensor, x in names.split(name, weight).items():
            other = next(v for k, v in expected.items() if source.images.own_name(k) == tensor)
            difference = (x - other).abs()
            if tensor.endswith("attn.qkv.bias"):
                difference.chunk(3)[1].zero_()
            elif "vision" in tensor and tensor.endswith("k_proj.bias"):
                difference.zero_()
            assert float(difference.max()) < 2e-4, tensor


@pytest.mark.parametrize(("family", "vision"), CASES)
def test_trajectories_equal_plain_torch(tmp_path, family, vision):
    folder = save(hf_model(family), tmp_path / "hf")
    our_steps(family, str(folder), str(tmp_path / "out"), 6, {"model": {"vision": vision}})
    compare(folder, torch.load(tmp_path / "out"), plain_steps(family, 6, vision))
