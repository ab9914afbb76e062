"""Megatron-Core's parallel linear layers with low-rank adapters beside their frozen weight.

Every adapter of a fused layer has factors A and B of its own, as in PEFT (product.py). What an
adapter adds must be in the state in which the layer's own output is, because the two are added:

                        output of the layer         A              what A x needs    B
    column parallel     this rank's channels        whole          (see below)       its channels
    row parallel        sum over the ranks          its channels   summed            whole
    experts, column     this rank's channels        whole          nothing           its channels
    experts, row        a term of that sum          its channels   nothing           whole

A x has r channels, so it is cheap to communicate, and a gathered input is never needed nor kept:

                                 forward                  backward
    column                       nothing                  summed over the ranks
    column, sequence parallel    gathered                 summed and scattered
    column, experts              nothing                  nothing: the dispatcher sums the input's
    row                          summed over the ranks    nothing
    row, sequence parallel       summed and scattered     gathered
    row, experts                 nothing: the dispatcher  nothing
                                 sums the output

The whole factor is the same on every rank. Under sequence parallelism a rank has its gradient for
its own tokens only, and in experts for its own channels only: Megatron-Core then sums it, because
it is marked.

Shapes: T tokens, R rank, P adapters.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.model.adapters.product import Span, add_products, low_products
from megatron_prefix.model.layers import SEQUENCE_PARALLEL


class LowRank(torch.nn.Module):
    """The factors of one adapter: A [R, in] and B [out, R], or this rank's part of one of them.

    It is called for its factors, so that a wrapper that gathers updated weights late sees the call.
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        like = torch.empty(0, dtype=dtype, device=device)
        self.lora_A = torch.nn.Parameter(like.new_empty(rank, num_inputs))
        self.lora_B = torch.nn.Parameter(like.new_empty(num_outputs, rank))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B


class AdaptedLinear(torch.nn.Module):
    """Adds adapters to the linear layer that is the next base class.

    `targets` are the names of the layers that are fused in it. Those of `config.lora` that are
    among them get an adapter.
    """

    targets: ClassVar[tuple[str, ...]]
    is_column: ClassVar[bool]

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        is_expert: bool = False,
        tp_group: torch.distributed.ProcessGroup | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(
            input_size, output_size, config=config, is_expert=is_expert, tp_group=tp_group, **kwargs
        )
        lora: LoraConfig = config.lora
        self.group = get_tensor_model_parallel_group_if_none(tp_group, is_expert=is_expert)
        ranks = self.group.size()
        self.is_expert_layer, self.is_sequence_parallel = is_expert, config.sequence_parallel
        self.scale, self.has_adapters_on = lora.scale, True
        self.num_groups, widths = self._fused_widths(config, output_size)
        self.adapters = torch.nn.ModuleDict()
        self.spans: list[Span] = []
        start = 0
        num_inputs = input_size if self.is_column else input_size // ranks
        place = config.params_dtype, next(self.parameters()).device
        for name, width in zip(self.targets, widths, strict=True):
            if name in (lora.target_modules or ()):
                assert lora.r is not None
                adapter = LowRank(num_inputs, self.num_groups * width, lora.r, *place)
                self._mark(adapter, is_expert and config.expert_model_parallel_size > 1)
                self.adapters[name] = adapter
                self.spans.append((start, start + width))
            start += width

    def _fused_widths(
        self, config: TransformerConfig, output_size: int
    ) -> tuple[int, tuple[int, ...]]:
        """Groups of this rank's output channels, and how many of each fused layer are in one."""
        ranks = self.group.size() if self.is_column else 1
        if len(self.targets) < 3:
            return 1, (output_size // ranks // len(self.targets),) * len(self.targets)
        # 6 query heads and 2 key heads of 8 channels: 2 groups of 24, 8 and 8 channels
        groups, channels = config.num_query_groups, config.kv_channels
        assert groups is not None and channels is not None
        heads = config.num_attention_heads // groups
        return groups // ranks, (heads * channels, channels, channels)

    def _mark(self, adapter: LowRank, is_shared_by_experts: bool) -> None:
        """Mark the divided factor as a slice, and the whole one as a sum over ranks if its gradient
        is one."""
        whole, divided = adapter.lora_B, adapter.lora_A
        if self.is_column:
            whole, divided = divided, whole
        axis = 0 if self.is_column else 1
        set_tensor_model_parallel_attributes(divided, True, axis, 1)
        setattr(whole, SEQUENCE_PARALLEL, self.is_sequence_parallel)
        for factor in (whole, divided):
            factor.allreduce = not is_shared_by_experts  # type: ignore[attr-defined]

    def forward(
        self, input_: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output with the adapters' added, and its bias if the caller adds that."""
        if not (self.has_adapters_on and self.adapters):
            return super().forward(input_, *args, **kwargs)
        firsts, seconds = zip(*(adapter() for adapter in self.adapters.values()), strict=True)
        # one product for all adapters of the layer
        factor = firsts[0] if len(firsts) == 1 else torch.cat(firsts)
        input_, low = low_products(input_, factor)
        output, bias = super().forward(input_, *args, **kwargs)
        low = self._communicated(low * self.scale)
        return add_products(output, low, seconds, self.spans, self.num_groups), bias

    def _communicated(self, low: Tensor) -> Tensor:
        """A x, made what B of this rank must see; see the tables of the module."""
        if self.is_expert_layer or self.group.size() == 1:
            return low
        if self.is_column:
            if self.is_sequence_parallel:
                return gather_from_sequence_parallel_region(low, group=self.group)
            return copy_to_tensor_model_parallel_region(low, group=self.group)
        if self.is_sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        return reduce_from_tensor_model_parallel_region(low, group=self.group)


class OfQKV(AdaptedLinear):
    targets, is_column = ("q_proj", "k_proj", "v_proj"), True


class OfOutput(AdaptedLinear):
    targets, is_column = ("o_proj",), False


class OfGateUp(AdaptedLinear):
    targets, is_column = ("gate_proj", "up_proj"), True


class OfDown(AdaptedLinear):
    targets, is_column = ("down_proj",), False


class QKVLinear(OfQKV, ColumnParallelLinear):
    """Queries, keys and values."""


class OutputLinear(OfOutput, RowParallelLinear):
    """The projection after attention."""


class GateUpLinear(OfGateUp, ColumnParallelLinear):
    """Gate and up-projection of a feed-forward layer or an expert."""


class DownLinear(OfDown, RowParallelLinear):
    """The projection back."""
