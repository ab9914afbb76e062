"""The vision half of a Hugging Face model of images, by its configuration."""

from megatron_prefix.model.hf.vision.tower import IMAGE_MODELS, pictures_work, vision_tower

__all__ = ["IMAGE_MODELS", "pictures_work", "vision_tower"]
