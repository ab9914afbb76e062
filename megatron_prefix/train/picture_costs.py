"""What pictures cost before the language model, so that ranks get rows of similar work."""

from __future__ import annotations

from dataclasses import replace

from megatron_prefix.data.steps import Sampler
from megatron_prefix.model.hf import HFModel
from megatron_prefix.model.vision import VisionSettings


def with_pictures(
    sampler: Sampler, source: HFModel | None, vision: VisionSettings | None
) -> Sampler:
    """The sampler with the cost of each picture of its data set; unchanged without pictures.

    Costs are forward passes of the language model, which is computed three times in training: what
    is frozen once, so it counts a third.
    """
    store = sampler.dataset.images
    if store is None or source is None or vision is None or sampler.cost is None:
        return sampler
    tower, projector = (
        1.0 if is_trained else 1 / 3
        for is_trained in (vision.trains_tower, vision.trains_projector)
    )
    works = source.pictures_work(store.sizes, store.grids, store.several)
    costs = tuple(tower * work.tower + projector * work.projector for work in works)
    return replace(sampler, cost=replace(sampler.cost, per_picture=costs))
