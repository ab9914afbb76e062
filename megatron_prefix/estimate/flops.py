"""Operations of one forward pass over a row, by part; data/steps/cost.py has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_prefix.config import ModelSizes
from megatron_prefix.config.parts import PictureWork
from megatron_prefix.data.steps import CostModel, MicroBatch


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations of one forward pass, by part."""

    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    adapters: float = 0.0
    tower: float = 0.0
    """Of the pictures, before the language model."""
    projector: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        mine, theirs = asdict(self), asdict(other)
        return ForwardFlops(**{part: mine[part] + theirs[part] for part in mine})


def forward_flops(
    sizes: ModelSizes,
    vocab_size: int,
    batch: MicroBatch,
    kind: str = "lm",
    pictures: Sequence[PictureWork] = (),
) -> ForwardFlops:
    """Operations of one forward pass over a row: linear layers on every token of it, attention on
    its visible (q, k) entries in each layer's window, the head on the tokens that predict. `kind`
    is the model's; `pictures` is the work of each picture of the data set."""
    cost = CostModel.of_model(sizes, vocab_size, kind)
    encoded = [] if batch.images is None else [pictures[i] for i in batch.images.encoded_ids]
    return ForwardFlops(
        tower=sum(work.tower for work in encoded),
        projector=sum(work.projector for work in encoded),
        linear=cost.per_token * len(batch.tokens),
        attention=cost.per_entry * cost.area(batch.layout.first_positions, batch.layout.lengths),
        head=cost.per_logit_token * batch.num_projected,
    )
