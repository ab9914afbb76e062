"""The vision part as a module: precision, modes, what is trained of it."""

from __future__ import annotations

import inspect

import pytest
import torch
from image_models import FAMILIES, RandomPictures, hf_model, save
from megatron.core.distributed import finalize_model_grads as module
from safetensors.torch import load_file

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import HFModel
from megatron_prefix.model.vision import PixelBatch, RowPixels, VisionPart, VisionSettings

CPU = torch.device("cpu")


def part_of(folder, dtype=torch.float32, **trained) -> VisionPart:
    part = VisionPart(VisionSettings(directory=folder, **trained), dtype, CPU)
    source, files = HFModel.read(folder), load_file(folder / "model.safetensors")
    assert source.images is not None
    tensors = {source.images.own_name(name): tensor for name, tensor in files.items()}
    with torch.no_grad():
        for name, parameter in part.model.named_parameters():
            parameter.copy_(tensors[name])
    return part


def row_of(pictures, lengths) -> RowPixels:
    numbers = range(len(pictures.images))
    none = torch.zeros(0, dtype=torch.int64)
    return RowPixels(
        batches=(PixelBatch(tuple(numbers), pictures.pixels(numbers)),),
        lengths=tuple(lengths),
        names=tuple(f"image {number}" for number in numbers),
        places=none,
        sources=none,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_features_in_bfloat16_are_those_of_transformers(tmp_path, family):
    """To the bit: tables of angles stay in float32 in both, also after a cast of the whole model,
    as wrappers for mixed precision do it."""
    model = hf_model(family)
    folder = save(model, tmp_path)
    pictures = RandomPictures.make(family, 3)
    part = part_of(folder).bfloat16()
    theirs = model.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    with torch.no_grad():
        numbers = range(3)
        features = theirs.get_image_features(**pictures.pixels(numbers), return_dict=True)
        expected = list(features.pooler_output)
        ours = part(row_of(pictures, [len(x) for x in expected]))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, torch.cat(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_feature_depends_on_is_not_trained(tmp_path, family):
    folder = save(hf_model(family), tmp_path)
    part = part_of(folder, trains_tower=True, trains_projector=True)
    frozen = {name for name, x in part.model.named_parameters() if not x.requires_grad}
    unused = ("encoder.layers.2.", "post_layernorm.") if family == "llava" else ("post_layernorm.",)
    assert all(any(part in name for part in unused) for name in frozen)
    assert bool(frozen) == (family != "qwen2_5_vl")
    part.nothing().backward()
    assert all((x.grad is not None) == x.requires_grad for x in part.model.parameters())
    assert all(not x.grad.any() for x in part.model.parameters() if x.grad is not None)


def test_it_stays_in_evaluation_mode(tmp_path):
    part = part_of(save(hf_model("llava"), tmp_path))
    part.train()
    assert not any(module.training for module in part.modules())


def test_another_number_of_features_is_refused(tmp_path):
    model = hf_model("llava")
    part, pictures = part_of(save(model, tmp_path)), RandomPictures.make("llava", 2)
    with pytest.raises(InputError, match="image 1: the model makes 4 features of it, .* 5"):
        part(row_of(pictures, [4, 5]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_are_averaged_over_tensor_parallel_ranks_if_they_may_differ(tmp_path, device):
    """By the name that Megatron-Core reads; without a GPU all of them are equal."""
    settings = VisionSettings(directory=save(hf_model("llava"), tmp_path), trains_projector=True)
    part = VisionPart(settings, torch.float32, torch.device(device))
    averaged = {x.average_gradients_across_tp_domain for x in part.parameters()}
    assert averaged == {device != "cpu"}
    source = inspect.getsource(inspect.getmodule(module))
    assert '"average_gradients_across_tp_domain"' in source


def test_only_the_own_device_is_started(tmp_path, monkeypatch):
    """torch starts every GPU of the machine if it is not told whose random numbers to keep."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("all devices"))
    HFModel.read(save(hf_model("llava"), tmp_path)).image_part("cpu")
