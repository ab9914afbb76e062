"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) on prefix trees.

Names of parameters, and so checkpoints, are those of Megatron-Core's `MLASelfAttention`. That layer
computes positions from the order of tokens; this one takes the rotation of each token's depth on
its root path. config/parts/latent.py has what is computed.

The two matrices that compress are whole on every tensor-parallel rank: their outputs feed the
heads of all ranks. Their gradients are

    without sequence parallelism   the same on every rank: each rank's heads give a part, and the
                                   parts are summed before they reach the compressed states
    with it                        those of a rank's own tokens, summed over ranks at the end

Shapes: T tokens, C hidden channels, N heads of this rank; s tensor-parallel ranks with sequence
parallelism, else 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.attention import TreePackedSeqParams
from megatron_prefix.model.layers.norm import SEQUENCE_PARALLEL, RMSNorm


@dataclass(kw_only=True)
class LatentSubmodules:
    """Parts that a layer spec may replace."""

    core_attention: ModuleSpec | type
    linear_q_proj: type = ColumnParallelLinear
    linear_q_down_proj: type
    linear_q_up_proj: type = ColumnParallelLinear
    linear_kv_down_proj: type
    linear_kv_up_proj: type = ColumnParallelLinear
    linear_proj: type = RowParallelLinear


class WholeLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank has whole, marked like `RMSNorm`."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": config.params_dtype}
        if not config.use_cpu_initialization:
            place["device"] = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, **place))
        self.bias = torch.nn.Parameter(torch.zeros(outputs, **place)) if bias else None
        for parameter in self.parameters():
            setattr(parameter, SEQUENCE_PARALLEL, config.sequence_parallel)
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LatentSelfAttention(MegatronModule):
    """Attention of a layer whose queries, keys and values come from compressed hidden states."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        """`cp_comm_type`, `pp_layer_offset` and `name` are None, or of no use for this layer."""
        super().__init__(config=config)
        parts = getattr(config, "architecture")  # noqa: B009
        assert parts.latent is not None and pg_collection is not None
        latent = self.latent = parts.latent
        self.tp_group = pg_collection.tp
        heads, width = config.num_attention_heads, config.hidden_size
        query_rows = heads * latent.query_channels
        if latent.query_rank is None:
            self.linear_q_proj = self._up(submodules.linear_q_proj, width, query_rows)
        else:
            self.linear_q_down_proj = submodules.linear_q_down_proj(
                config, width, latent.query_rank, latent.down_bias
            )
            self.q_layernorm = RMSNorm(config, latent.query_rank, latent.norm_epsilon)
            self.linear_q_up_proj = self._up(
                submodules.linear_q_up_proj, latent.query_rank, query_rows
            )
        self.linear_kv_down_proj = submodules.linear_kv_down_proj(
            config, width, latent.down_rows, latent.down_bias
        )
        self.kv_layernorm = RMSNorm(config, latent.key_value_rank, latent.norm_epsilon)
        self.linear_kv_up_proj = self._up(
            submodules.linear_kv_up_proj,
            latent.key_value_rank,
            heads * (latent.unrotated_channels + latent.value_channels),
        )
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        self.linear_proj = submodules.linear_proj(
            heads * latent.value_channels,
            width,
            config=config,
            init_method=config.output_layer_init_method,
            bias=parts.output_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _up(self, kind: type, inputs: int, outputs: int) -> torch.nn.Module:
        """A linear layer whose outputs are divided by heads."""
        return kind(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: TreePackedSeqParams,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T / s, 1, C] -> [T / s, 1, C], and the bias that is to be added."""
        query, key, value = self._query_key_value(hidden_states, packed_seq_params)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attention: Callable[..., Tensor] = self.core_attention
            return attention(query, key, value, None, packed_seq_params=packed_seq_params)

        if self.config.recompute_granularity == "selective" and self.training:
            attended = checkpoint(attend, False, query, key, value)
        else:
            attended = attend(query, key, value)
        return self.linear_proj(attended)

    def _query_key_value(
        self, hidden_states: Tensor, params: TreePackedSeqParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values, all [T, 1, N, channels]."""
        latent, rotation = self.latent, params.rotation
        assert rotation is not None, "the model sets it"
        if latent.query_rank is None:
            query = self.linear_q_proj(hidden_states)[0]
        else:
            compressed = self.q_layernorm(self.linear_q_down_proj(hidden_states))
            query = self.linear_q_up_proj(compressed)[0]
        compressed, key_rotated = self.linear_kv_down_proj(hidden_states).split(
            [latent.key_value_rank, latent.rotated_channels], dim=-1
        )
        key_value = self.linear_kv_up_proj(self.kv_layernorm(compressed))[0]
        plain, channels = latent.unrotated_channels, latent.query_channels
        query = query.squeeze(1).unflatten(-1, (-1, channels))
        key_value = key_value.squeeze(1).unflatten(-1, (-1, plain + latent.value_channels))
        # one rotated part for the heads of all ranks: in backward theirs are summed
        shared = rotation.turn(self._for_all_heads(key_rotated).contiguous())
        key = torch.cat([key_value[..., :plain], shared.expand(-1, key_value.size(1), -1)], dim=-1)
        rotated = rotation.turn(query[..., plain:].contiguous())
        query = torch.cat([query[..., :plain], rotated], dim=-1)
        value = key_value[..., plain:].contiguous()
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)

    def _for_all_heads(self, x: Tensor) -> Tensor:
        """[T / s, 1, channels] of this rank -> [T, 1, channels] for its heads."""
        if self.tp_group.size() == 1:
            return x
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)


def with_latent_attention(layer: ModuleSpec, core_attention: ModuleSpec) -> ModuleSpec:
    """Put this attention into a layer spec; changes and returns `layer`.

    Checkpoints use the names of Transformer Engine, which fuses the norms of what is compressed
    with the layers after them, and not the norm of the layer's input.
    """
    submodules = LatentSubmodules(
        core_attention=core_attention,
        linear_q_down_proj=WholeLinear,
        linear_kv_down_proj=WholeLinear,
    )
    layer.submodules.self_attention = ModuleSpec(module=LatentSelfAttention, submodules=submodules)
    names = {**layer.submodules.sharded_state_dict_keys_map}
    del names["input_layernorm."]
    attention = "self_attention."
    names[f"{attention}q_layernorm."] = f"{attention}linear_q_up_proj.layer_norm_"
    names[f"{attention}kv_layernorm."] = f"{attention}linear_kv_up_proj.layer_norm_"
    layer.submodules.sharded_state_dict_keys_map = names
    return layer
