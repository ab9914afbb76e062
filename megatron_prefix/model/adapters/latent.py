"""Adapters of the linear layers before multi-latent attention.

The matrices that come after the compressed states are divided by heads, so their adapters are those
of any column-parallel layer (linear.py). The matrices that compress are whole on every rank, and so
are both factors of their adapters; under sequence parallelism Megatron-Core sums their gradients.

Shapes: T tokens, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.model.adapters.linear import AdaptedLinear, LowRank
from megatron_prefix.model.layers import SEQUENCE_PARALLEL


class QueryLinear(AdaptedLinear, ColumnParallelLinear):
    """Queries of hidden states."""

    targets, is_column = ("q_proj",), True


class QueryUpLinear(AdaptedLinear, ColumnParallelLinear):
    """Queries of compressed queries."""

    targets, is_column = ("q_b_proj",), True


class KeyValueUpLinear(AdaptedLinear, ColumnParallelLinear):
    """Keys and values of the latent."""

    targets, is_column = ("kv_b_proj",), True


class AdaptedWhole(torch.nn.Module):
    """Adds an adapter to the whole linear layer that is the next base class."""

    target: ClassVar[str]

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(config, inputs, outputs, bias)
        lora: LoraConfig = getattr(config, "lora")  # noqa: B009
        assert lora.r is not None
        self.scale, self.has_adapters_on = lora.scale, True
        place = config.params_dtype, next(self.parameters()).device
        adapter = LowRank(inputs, outputs, lora.r, *place)
        for factor in adapter.parameters():
            setattr(factor, SEQUENCE_PARALLEL, config.sequence_parallel)
            factor.allreduce = True  # type: ignore[attr-defined]
        self.adapters = torch.nn.ModuleDict({self.target: adapter})

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, in] -> [T, 1, out], both of this rank's tokens."""
        output = super().forward(x)
        if not self.has_adapters_on:
            return output
        first, second = self.adapters[self.target]()
        return output + F.linear(F.linear(x, first) * self.scale, second)


def with_latent_adapters(attention: Any, targets: set[str]) -> None:
    """Replace the linear layers before attention that `targets` names; `attention` are the
    submodules of multi-latent attention."""
    columns = {
        "linear_q_proj": QueryLinear,
        "linear_q_up_proj": QueryUpLinear,
        "linear_kv_up_proj": KeyValueUpLinear,
    }
    for part, kind in columns.items():
        if targets & set(kind.targets):
            setattr(attention, part, kind)
    for part, target in (
        ("linear_q_down_proj", "q_a_proj"),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    ):
        if target in targets:
            bases = (AdaptedWhole, getattr(attention, part))
            setattr(attention, part, type("AdaptedWholeLinear", bases, {"target": target}))
