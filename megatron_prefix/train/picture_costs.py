"""What pictures cost in front of the language model, so that ranks get rows of similar work."""

from __future__ import annotations

from dataclasses import replace

from megatron_prefix.checkpoint import StartingModel
from megatron_prefix.data.steps import Sampler


def with_pictures(sampler: Sampler, initial: StartingModel) -> Sampler:
    """The sampler with the cost of each picture of its data set; unchanged without pictures.

    Costs are forward passes of the language model, which is computed three times in training: what
    is frozen once, so it counts a third.
    """
    store, source = sampler.dataset.images, initial.source
    if store is None or source is None or source.images is None or sampler.cost is None:
        return sampler
    vision = initial.transformer_config(seed=0).vision
    assert vision is not None, "the model reads images"
    tower, projector = (
        1.0 if is_trained else 1 / 3
        for is_trained in (vision.trains_tower, vision.trains_projector)
    )
    works = source.pictures_work(store.sizes, store.grids, store.several)
    costs = tuple(tower * work.tower + projector * work.projector for work in works)
    return replace(sampler, cost=replace(sampler.cost, per_picture=costs))
