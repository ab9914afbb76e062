"""Parameters, memory and operations of the part that reads images, computed from sizes.

It is on the first pipeline stage, whole on every tensor-parallel rank. A frozen tower keeps nothing
for backward. A projector that is trained keeps its input and its two inner values of each
projection, a tower that is trained keeps 8 C + 2 F values of each patch and layer: inputs and
outputs of both norms, queries, keys, values and output of attention, and the feed-forward layer
before and after its activation (C and F as in config/parts/tower.py).

Backward costs two forward passes of what is trained, and nothing of what is frozen. With context
parallelism the images of a row are on all of its ranks, at most; that is what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_prefix.config import Config, ModelConfig, ParallelConfig
from megatron_prefix.config.parts import PictureWork, VisionTower
from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.memory import (
    ADAM_BYTES,
    BYTES,
    GRADIENT_BYTES,
    RankMemory,
    chunks_in_flight,
    state_sharers,
)
from megatron_prefix.model.hf import HFModel


@dataclass(frozen=True, kw_only=True)
class KnownVision:
    """The part that reads images, and the work of each picture of the data set."""

    sizes: VisionTower
    tower: int
    """Parameters."""
    projector: int
    trains_tower: bool
    trains_projector: bool
    pictures: Sequence[PictureWork] = ()

    @classmethod
    def of(cls, model: HFModel, config: Config) -> KnownVision | None:
        """That of a model; None if it reads no images."""
        if model.images is None:
            return None
        counts = {True: 0, False: 0}
        for name, shape in model.image_shapes.items():
            counts[model.images.is_projector(name)] += math.prod(shape)
        section, has_adapters = config.model.vision, config.lora is not None
        return cls(
            sizes=model.vision_tower,
            tower=counts[False],
            projector=counts[True],
            trains_tower=section is not None and not section.freeze_tower,
            trains_projector=not has_adapters
            if section is None
            else section.trains_projector(has_adapters),
        )

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.tower * self.trains_tower + self.projector * self.trains_projector

    @property
    def counts(self) -> dict[str, int]:
        """Parameters by component."""
        return {"vision tower": self.tower, "projector": self.projector}

    def backward(self, forward: ForwardFlops) -> float:
        """Operations of backward."""
        return 2 * (forward.tower * self.trains_tower + forward.projector * self.trains_projector)

    def kept(self, model: ModelConfig, batch: MicroBatch) -> int:
        """Bytes of a row that are kept for backward."""
        if batch.images is None:
            return 0
        encoded = [self.pictures[i] for i in batch.images.encoded_ids]
        sizes, values = self.sizes, 0
        if self.trains_projector or self.trains_tower:
            before, between, _ = sizes.projector_sizes
            values += (before + 2 * between) * sum(work.projections for work in encoded)
        if self.trains_tower:
            layer = 8 * sizes.hidden_size + 2 * sizes.ffn_hidden_size
            values += layer * sizes.num_layers * sum(work.patches for work in encoded)
        return values * BYTES[model.dtype]


def with_vision(
    memory: RankMemory,
    vision: KnownVision,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    has_reference: bool,
    rows: int | None,
    kept: int,
) -> RankMemory:
    """The memory of a rank of the first stage with the part that reads images; `kept` bytes of each
    row are kept for backward, and `has_reference` is true if there is a second, frozen one."""
    size, sharers = BYTES[model.dtype], state_sharers(parallel, world_size)[0]
    whole = size * (vision.tower + vision.projector)
    return replace(
        memory,
        weights=memory.weights + whole,
        gradients=memory.gradients + GRADIENT_BYTES * vision.trained,
        optimizer=memory.optimizer + ADAM_BYTES[model.dtype] * vision.trained // sharers,
        reference=memory.reference + whole * has_reference,
        activations=memory.activations + kept * chunks_in_flight(0, parallel, rows),
    )
