"""The settings of the part of a model that reads images: what of it is trained."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import KNOWN_KEYS, Switch


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class VisionConfig:
    """Which weights before the language model are trained."""

    freeze_tower: Switch = True
    """Keep the vision tower, which makes features of an image's patches, as it is."""
    freeze_projector: Switch | None = None
    """Keep the projector as it is, which brings these features into the language model (of
    Qwen2.5-VL: the merger). Not given: it is trained, except beside adapters."""

    def trains_projector(self, has_adapters: bool) -> bool:
        """Whether the projector is trained; beside adapters everything else is frozen."""
        return not has_adapters if self.freeze_projector is None else not self.freeze_projector
