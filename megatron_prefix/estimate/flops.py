"""Operations of one forward pass over a row, by part; data/steps/cost.py has the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.config import ModelSizes
from megatron_prefix.data.steps import CostModel, MicroBatch


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations of one forward pass, by part."""

    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    adapters: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head + self.adapters

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        return ForwardFlops(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            head=self.head + other.head,
            adapters=self.adapters + other.adapters,
        )


def forward_flops(
    sizes: ModelSizes, vocab_size: int, batch: MicroBatch, kind: str = "lm"
) -> ForwardFlops:
    """Operations of one forward pass over a row: linear layers on every token of it, attention on
    its visible (q, k) entries in each layer's window, the head on the tokens that predict. `kind`
    is the model's."""
    cost = CostModel.of_model(sizes, vocab_size, kind)
    return ForwardFlops(
        linear=cost.per_token * len(batch.tokens),
        attention=cost.per_entry * cost.area(batch.layout.first_positions, batch.layout.lengths),
        head=cost.per_logit_token * batch.num_projected,
    )
