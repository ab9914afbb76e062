"""The part of a model that reads images: transformers' own module, before the first layer."""

from megatron_prefix.model.vision.part import VisionPart, VisionSettings
from megatron_prefix.model.vision.pixels import PixelBatch, RowPixels
from megatron_prefix.model.vision.positions import axis_positions

__all__ = ["PixelBatch", "RowPixels", "VisionPart", "VisionSettings", "axis_positions"]
