"""Steps on rows with images are the same in every layout: losses, gradient norms, weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from image_models import hf_model, save
from image_steps import our_steps
from processes import on_ranks
from runs import TIMEOUT_S

LAYOUTS = {
    "tensor and sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "data": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}
NUM_STEPS = 4
VISION = {"freeze_tower": False}


@pytest.fixture(
    scope="module",
    params=["qwen2_5_vl", pytest.param("llava_onevision", marks=pytest.mark.slow)],
)
def alone(request, tmp_path_factory):
    """A family, its directory, and what one process computes."""
    family, root = request.param, tmp_path_factory.mktemp("alone")
    folder = save(hf_model(family), root / "hf")
    more = {"model": {"vision": VISION}}
    our_steps(family, str(folder), str(root / "out"), NUM_STEPS, more)
    return family, folder, torch.load(root / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same(alone, layout, tmp_path):
    """All parts of the model are trained. With data parallelism the second rank has no images, and
    with context parallelism most images have tokens on both."""
    family, folder, (steps, weights) = alone
    more = {"model": {"vision": VISION}, "parallel": LAYOUTS[layout]}
    action = partial(our_steps, family, str(folder), str(tmp_path / "out"), NUM_STEPS, more)
    on_ranks(2, action, tmp_path, TIMEOUT_S)
    own_steps, own = torch.load(tmp_path / "out")
    for ours, theirs in zip(own_steps, steps, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-7)
    assert own.keys() == weights.keys()
    for name, weight in weights.items():
        difference = (own[name] - weight).abs()
        if name.endswith("attn.qkv.bias"):
            difference.chunk(3)[1].zero_()  # of keys: a gradient of rounding alone
        elif "vision" in name and name.endswith("k_proj.bias"):
            difference.zero_()
        assert float(difference.max()) < 1e-4, name
