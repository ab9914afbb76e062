"""Adapter between Megatron-Core's attention layers and tree attention.

`TreePackedSeqParams` carries the metadata of one micro batch to every layer: Megatron-Core passes
the `packed_seq_params` object unchanged through all stages, virtual chunks and recomputation.
`TreeCoreAttention` replaces `core_attention` in a layer spec.

Shapes: T tokens, N query heads, G key/value heads, H head dim, U tokens with logits, I targets.
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
from megatron_prefix.attention.context_parallel import ContextShare
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.attention.rotary import Rotation, rotate


@dataclass(kw_only=True)
class TreePackedSeqParams(PackedSeqParams):
    """Metadata of one row for the layers and the head.

    With context parallelism all arrays are those of this rank's own tokens, and indices count
    among these. For example, tokens [5, 6, 7, 8] predict the targets [6], [7], [8, 11], [] (token
    7 is a branch point):

        logit_tokens    [0, 1, 2]
        logit_of_target [0, 1, 2, 2]
        target_offsets  [0, 1, 2, 4]
    """

    qkv_format: str | None = None
    plan: TreePlan
    """Who sees whom."""
    share: ContextShare | None = None
    """This rank's part of the row, with context parallelism."""
    position_ids: Tensor
    """int64 [T]: each token's depth along its root path."""
    rotation: Rotation | None = None
    """Rotates queries and keys by their positions. A model sets it; None rotates nothing."""
    logit_tokens: Tensor
    """int64 [U]: the tokens that become logits, ascending."""
    logit_of_target: Tensor
    """int64 [I]: the index into `logit_tokens` of the token that predicts a target, ascending."""
    target_tokens: Tensor
    """int64 [I]: the token that is predicted."""
    target_offsets: np.ndarray | None = None
    """[U + 1] on the host: logits u predict the targets `target_offsets[u]` up to, not including,
    `target_offsets[u + 1]`. If None, it is computed from `logit_of_target`."""
    responses_served: Tensor | None = None
    """[T], for routers: how many of the row's responses a token is part of; 0 for padding."""
    with_collisions: bool = False
    """Whether the head also gives log(sum over the vocabulary of p^2) for every target."""
    with_scales: bool = False
    """Whether the head also gives the size of what is rounded on the way to every target."""
    step_count: float = 0.0
    """For routers: the sum of what counts, over the step's rows on all ranks."""

    def __post_init__(self) -> None:
        if self.qkv_format is None:
            self.qkv_format = "sbhd"
        if self.qkv_format == "thd":
            raise ValueError(
                "TreePackedSeqParams.qkv_format = 'thd' would make attention layers cut rows at "
                "cu_seqlens: leave it at 'sbhd'"
            )
        # Megatron-Core takes the row for one sequence; only the plan knows that it holds several.
        self.max_seqlen_q = self.max_seqlen_kv = self.plan.layout.num_tokens


class TreeCoreAttention(MegatronModule):
    """`core_attention` in which each token sees only its ancestors and itself."""

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
                f"layer {layer_number} asks for {attention_type} attention with mask "
                f"{attn_mask_type}, but tree attention is causal self-attention: use "
                "tree_layer_spec"
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
                f"{type(packed_seq_params).__name__}: pass a batch's `params`, as forward_step does"
            )
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "tree attention takes its mask from the plan: pass no mask and no bias"
            )
        # One row is one micro batch, so the batch dimension is always 1.
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        if packed_seq_params.rotation is not None:
            query, key = (rotate(x, packed_seq_params.rotation) for x in (query, key))
            value = value.contiguous()  # a view would keep the unrotated query and key alive
        qkv = query, key, value
        if packed_seq_params.share is None:
            plan, scale = packed_seq_params.plan, self.softmax_scale
            out = tree_attention(*qkv, plan, backend=self.backend, scale=scale)
        else:
            out = packed_seq_params.share.attend(*qkv, self.backend, self.softmax_scale)
        return out.flatten(1).unsqueeze(1)
