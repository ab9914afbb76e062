"""Adapter between Megatron-Core's attention layers and tree attention.

`TreePackedSeqParams` carries one micro batch's metadata to every layer: Megatron-Core hands the
`packed_seq_params` object through all stages, virtual chunks and recomputation unchanged.
`TreeCoreAttention` takes the place of `core_attention` in a layer spec.

Shapes: T tokens, N query heads, G key/value heads, H head dim, U projected rows, I targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.attention.api import tree_attention
from megatron_prefix.attention.context_parallel.transports import ContextShare
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.attention.rotary import Rotation, rotate


@dataclass
class TreePackedSeqParams(PackedSeqParams):
    """What the layers and the head need to know of one row, beside its tokens.

    `plan` says who sees whom; `position_ids` int64 [T] is each token's depth along its root
    path; `projected_rows` int64 [U] are the rows that become logits, ascending; target i is
    `target_tokens[i]` under projected row `target_rows[i]` (index into `projected_rows`,
    ascending), both int64 [I], and row u has the targets `target_offsets[u]` to
    `target_offsets[u + 1]`, [U + 1] on the host. Under context parallelism `share` is this rank's
    part of the row, and the arrays are those of its own tokens, counted among them. `rotation`
    turns queries and keys by their positions; a model sets it, and attention without it turns
    nothing.

    For routers: `responses_served` [T] is how many of the row's responses each token is part of, 0
    for padding; `step_count` is the sum of what counts over the step's rows on all ranks.
    """

    plan: TreePlan | None = None
    share: ContextShare | None = None
    position_ids: Tensor | None = None
    rotation: Rotation | None = None
    projected_rows: Tensor | None = None
    target_rows: Tensor | None = None
    target_offsets: np.ndarray | None = None
    target_tokens: Tensor | None = None
    responses_served: Tensor | None = None
    step_count: float = 0.0

    def __post_init__(self) -> None:
        if self.plan is None:
            raise ValueError("TreePackedSeqParams needs a plan: TreePlan(layout, device)")
        if self.qkv_format is None:
            self.qkv_format = "sbhd"
        if self.qkv_format == "thd":
            raise ValueError(
                "TreePackedSeqParams.qkv_format is 'thd', which makes attention layers cut rows "
                "at cu_seqlens; leave it at 'sbhd'"
            )
        self.max_seqlen_q = self.max_seqlen_kv = self.plan.layout.num_tokens


class TreeCoreAttention(MegatronModule):
    """`core_attention` that lets each token see its ancestors only."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attention_type != "self" or attn_mask_type != AttnMaskType.causal:
            raise ValueError(
                f"tree attention is causal self-attention; layer {layer_number} asks for "
                f"{attention_type} attention with mask {attn_mask_type}"
            )
        if dropout:
            raise ValueError(f"attention_dropout = {dropout}: tree attention has none; set it to 0")
        self.softmax_scale = softmax_scale
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, 1, N, H], key and value [T, 1, G, H] -> [T, 1, N * H]."""
        if not isinstance(packed_seq_params, TreePackedSeqParams):
            raise ValueError(
                "tree attention needs packed_seq_params=TreePackedSeqParams(…), got "
                f"{type(packed_seq_params).__name__}: pass what forward_step passes"
            )
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "tree attention takes its mask from the plan: pass neither mask nor bias"
            )
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if packed_seq_params.rotation is not None:
            query, key = (rotate(x, packed_seq_params.rotation) for x in (query, key))
            value = value.contiguous()  # a view would keep query and key in front of the rotation
        qkv = query, key, value
        if packed_seq_params.share is None:
            plan, backend, scale = packed_seq_params.plan, self.backend, self.softmax_scale
            out = tree_attention(*qkv, plan, backend=backend, scale=scale)
        else:
            out = packed_seq_params.share.attend(*qkv, self.backend, self.softmax_scale)
        return out.flatten(1).unsqueeze(1)
