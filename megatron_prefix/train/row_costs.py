"""What rows of the run's model cost, so that ranks get rows of similar work."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.checkpoint import StartingModel
from megatron_prefix.data.steps import CostModel
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.model.vision import VisionSettings


@dataclass(frozen=True)
class ModelCosts:
    """The costs of the model `initial`; `vision` says what of the part that reads images is
    trained, and None that nothing is."""

    initial: StartingModel
    vision: VisionSettings | None = None

    def cost_model(self, dataset: PreferenceDataset, kind: str, is_trained: bool) -> CostModel:
        """As samplers.RowCosts has it."""
        initial, store, vision = self.initial, dataset.images, self.vision
        costs = CostModel.of_model(initial.sizes, dataset.vocab_size, kind)
        if store is None or initial.source is None or initial.source.images is None:
            return costs
        return costs.with_pictures(
            initial.source.pictures_work(store.sizes, store.grids, store.several),
            freezes_tower=is_trained and not (vision and vision.trains_tower),
            freezes_projector=is_trained and not (vision and vision.trains_projector),
        )
