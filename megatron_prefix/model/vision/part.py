"""The vision part: transformers' tower and projector, with their own `get_image_features`.

It is on the first pipeline stage, whole on every tensor-parallel rank. All of these ranks have the
same images and the same gradient at the embeddings, so the gradients of its weights are equal and
are not summed over them; over data- and context-parallel ranks they are. On CUDA some of
transformers' operations round differently each time (atomic additions), so there the gradients are
averaged over tensor-parallel ranks: their weights stay the same.

It runs in evaluation mode always: there is no dropout. Shapes: F features of a row, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.errors import InputError
from megatron_prefix.model.hf import HFModel
from megatron_prefix.model.vision.pixels import RowPixels

AVERAGED = "average_gradients_across_tp_domain"
"""What a parameter has if Megatron-Core averages its gradient over tensor-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """Which vision part a model has, and what of it is trained."""

    directory: Path
    """Has `config.json` and the image processor."""
    trains_tower: bool = False
    trains_projector: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the settings of the vision part in `config.json`."""
        return HFModel.read(self.directory).image_fingerprint


class VisionPart(torch.nn.Module):
    """transformers' model without its language model, as `model`."""

    def __init__(self, settings: VisionSettings, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        source = HFModel.read(settings.directory)
        family = source.images
        assert family is not None, "the configuration has a vision part"
        self.settings, self.model = settings, source.image_part(device)
        self.to(dtype)
        unused = self._unused() if settings.trains_tower else set()
        for name, parameter in self.model.named_parameters():
            is_projector = family.is_projector(name)
            is_trained = settings.trains_projector if is_projector else settings.trains_tower
            parameter.requires_grad_(is_trained and name not in unused)
            # not on CPU: gloo has no averages, and the gradients are equal there
            setattr(parameter, AVERAGED, device.type != "cpu")
        self.eval()

    def train(self, mode: bool = True) -> VisionPart:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionPart:
        """Apply `fn` to the weights; tables of angles move to their device and stay in float32, as
        transformers has them."""
        tables = [(name, x) for name, x in self.named_buffers() if x.is_floating_point()]
        super()._apply(fn, recurse)
        for name, table in tables:
            owner, _, last = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, last, table.to(getattr(module, last).device))
        return self

    def forward(self, row: RowPixels) -> Tensor:
        """The features of all images of a row, [F, C]. Raises InputError if an image has another
        number of features than its placeholders."""
        by_image = {
            image: part
            for batch in row.batches
            for image, part in zip(batch.images, self._features(batch.pixels), strict=True)
        }
        parts = [by_image[image] for image in range(len(row.lengths))]
        for name, part, length in zip(row.names, parts, row.lengths, strict=True):
            if len(part) != length:
                raise InputError(
                    f"{name}: the model makes {len(part)} features of it, and the data set has "
                    f"{length} placeholders: build the data set with the processor of this model"
                )
        return torch.cat(parts)

    def _features(self, pixels: Mapping[str, Tensor]) -> list[Tensor]:
        output: Any = self.model.get_image_features(**pixels, return_dict=True)
        return list(getattr(output, "pooler_output", output))

    def nothing(self) -> Tensor:
        """0, as a function of every trained weight: with it a row without images has a gradient for
        them, which data-parallel ranks wait for. 0-dimensional."""
        weights = [x for x in self.model.parameters() if x.requires_grad]
        if not weights:
            return torch.zeros(())
        return torch.stack([x.flatten()[0] for x in weights]).sum() * 0

    @property
    def is_trained(self) -> bool:
        return any(x.requires_grad for x in self.model.parameters())

    def _unused(self) -> set[str]:
        """Parameters that no feature depends on: layers after the one whose output is taken."""
        parameters = dict(self.model.named_parameters())
        with torch.enable_grad():
            total = torch.cat(self._features(self._example())).sum()
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        return {name for name, gradient in pairs if gradient is None}

    def _example(self) -> dict[str, Tensor]:
        """The smallest image."""
        config, weight = self.model.config.vision_config, next(self.model.parameters())
        if hasattr(config, "spatial_merge_size"):
            merge = config.spatial_merge_size
            channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
            return {
                "pixel_values": weight.new_zeros(merge**2, channels),
                "image_grid_thw": torch.tensor([[1, merge, merge]], device=weight.device),
            }
        size, channels = config.image_size, config.num_channels
        if not hasattr(self.model, "image_newline"):
            return {"pixel_values": weight.new_zeros(1, channels, size, size)}
        return {
            "pixel_values": weight.new_zeros(1, 2, channels, size, size),
            "image_sizes": torch.tensor([[size, size]], device=weight.device),
            "batch_num_images": torch.tensor([1], device=weight.device),
        }
