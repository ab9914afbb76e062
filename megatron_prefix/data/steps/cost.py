"""Floating-point operations of rows: what a perfect implementation would have to compute.

A multiply-add counts 2. Backward costs twice the forward pass. For a layer of hidden size C with
N query heads, G key/value heads of size H and feed-forward size F (gated):

    linear, a token      2 C (N + 2G) H  +  2 N H C  +  6 C F
    attention, an entry  4 N H           (scores and weighted sum, a visible (q, k) entry)
    head, a row          2 C V           (a reward model: 2 C)

With experts, 6 C F is that of the k experts of size F that each token is sent to, and the router of
E experts takes 2 C E.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.config.schema import ModelConfig
from megatron_prefix.data.steps.collate import MicroBatch


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations of one forward pass, by part."""

    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        return ForwardFlops(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            head=self.head + other.head,
        )


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Operations of one forward pass as a sum over what a row holds, see this module's head."""

    per_token: float
    """FLOP a token executed: the linear layers."""
    per_entry: float
    """FLOP a visible (q, k) entry: attention."""
    per_row: float
    """FLOP a row of logits: the head."""

    @classmethod
    def of_model(cls, model: ModelConfig, vocab_size: int) -> CostModel:
        """The constants of a model whose sizes are known."""
        heads = model.num_attention_heads
        groups, width = model.num_query_groups or heads, model.hidden_size
        head_dim = model.kv_channels or width // heads
        layer = 2 * width * (heads + 2 * groups) * head_dim + 2 * heads * head_dim * width
        if model.num_moe_experts:
            expert = 6 * width * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
            layer += model.moe_router_topk * expert + 2 * width * model.num_moe_experts
        else:
            layer += 6 * width * model.ffn_hidden_size
        columns = 1 if model.kind == "reward" else vocab_size
        return cls(
            per_token=float(model.num_layers * layer),
            per_entry=float(model.num_layers * 4 * heads * head_dim),
            per_row=float(2 * width * columns),
        )


def forward_flops(model: ModelConfig, vocab_size: int, batch: MicroBatch) -> ForwardFlops:
    """Operations of one forward pass over a row: linear layers on every token it executes,
    attention on the area its tokens see, the head on the rows that predict."""
    cost = CostModel.of_model(model, vocab_size)
    return ForwardFlops(
        linear=cost.per_token * len(batch.tokens),
        attention=cost.per_entry * batch.layout.area(),
        head=cost.per_row * batch.num_projected,
    )
