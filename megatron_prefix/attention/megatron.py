"""Adapter between Megatron-Core's attention layers and tree attention.

`TreePackedSeqParams` carries the metadata of one micro batch to every layer: Megatron-Core passes
the `packed_seq_params` object unchanged through all stages, virtual chunks and recomputation.
`TreeCoreAttention` replaces `core_attention` in a layer spec.

Shapes: T tokens, N query heads, G key/value heads, H head dim, U tokens with logits, I targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_prefix.attention.api import (
    check_fused_sums,
    prepare_plan,
    resolve_backend,
    tree_attention,
)
from megatron_prefix.attention.context_parallel import ContextShare
from megatron_prefix.attention.layer_settings import (
    attention_channels,
    features_of,
    layer_windows,
    softcap_of,
)
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.attention.rotary import Rotation, rotate, rotate_query


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
    axes: Tensor | None = None
    """int64 [3, T]: positions in time, height and width, by which M-RoPE rotates; None: each token
    has its `position_ids` on all three."""
    rotation: Rotation | None = None
    """Rotates queries and keys by their positions. A model sets it; None rotates nothing."""
    local_rotation: Rotation | None = None
    """The same for layers whose rotation is `local`."""
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
    with_logits: bool = False
    """Whether the head gives the logits of `logit_tokens` in place of log-probabilities."""
    step_count: float = 0.0
    """For routers: the sum of what counts, over the step's rows on all ranks."""
    with_auxiliary: bool = True
    """For routers: whether the auxiliary loss is added, if it has a coefficient."""

    def plan_of(self, window: int | None) -> TreePlan:
        """The plan of layers with a sliding window of so many tokens; None: without one."""
        if self.share is not None:
            return self.share.windowed(window).plan
        return self.plan.windowed(window)

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


def check_backend(config: Any, device: torch.device) -> None:
    """Raise ValueError, with the remedy, if the backend of a model's configuration,
    `tree_attention_backend`, cannot run on `device`, does not compute this attention, or has no use
    for a kernel that `config` asks for."""
    name, dtype, features = config.tree_attention_backend, config.params_dtype, features_of(config)
    channels = attention_channels(config)
    resolve_backend(name, device, dtype, channels, features=features)
    if "key_sums" in getattr(config, "kernels", ()):
        check_fused_sums(name, device, dtype, channels, features)


def prepare_attention(params: TreePackedSeqParams, config: Any) -> None:
    """Build the attention plans of a row for all layers of a model, before they run.

    `config` is the model's, with `tree_attention_backend`.
    """
    backend, dtype = config.tree_attention_backend, config.params_dtype
    for window in set(layer_windows(config)):
        plan = params.plan_of(window)
        prepare_plan(plan, backend, dtype, attention_channels(config), features_of(config))


class TreeCoreAttention(MegatronModule):
    """`core_attention` in which each token sees only its ancestors and itself.

    Sliding window, soft cap and sinks are those of the configuration: `window_size`,
    `window_attn_skip_freq` and `softmax_type` as Megatron-Core has them, and
    `attn_logit_softcapping`.
    """

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
        rotary: tuple[str, ...] = (),
    ) -> None:
        """`rotary` has the rotation of every layer of the model; empty: `global` in all."""
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
        self.rotary = rotary[layer_number - 1] if rotary else "global"
        self.window = layer_windows(config)[layer_number - 1]
        self.softcap = softcap_of(config)
        self.fuses_sums = "key_sums" in getattr(config, "kernels", ())
        self.softmax_offset: Tensor | None = None
        if config.softmax_type != "vanilla":
            self._add_sinks(pg_collection)

    def _add_sinks(self, groups: ProcessGroupCollection | None) -> None:
        """`softmax_offset` [query heads of this rank], under Megatron-Core's name: one more score
        of each softmax, learned or 0."""
        config = self.config
        self.tp_group = (groups or ProcessGroupCollection.use_mpu_process_groups(["tp"])).tp
        offset = torch.zeros(
            config.num_attention_heads // self.tp_group.size(),
            dtype=config.params_dtype,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        )
        del self.softmax_offset  # a parameter or buffer cannot replace an attribute
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", offset, persistent=False)
            return
        self.softmax_offset = torch.nn.Parameter(offset)
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        if config.perform_initialization:
            config.init_method(self.softmax_offset)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The sinks, divided by heads; nothing without them."""
        state = self.state_dict(keep_vars=True)
        if not state:
            return {}
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

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
        """query [T, 1, N, H], key and value [T, 1, G, H] -> [T, 1, N * H].

        Values may have other channels than queries and keys. The smaller ones are then filled up
        with zeros, which add nothing to scores or outputs.
        """
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
        rotation = packed_seq_params.rotation
        if self.rotary == "local":
            rotation = packed_seq_params.local_rotation
            assert rotation is not None, "the model sets it if a layer needs it"
        if rotation is not None and self.rotary != "none":
            query, key = rotate_query(query, rotation), rotate(key, rotation)
            value = value.contiguous()  # a view would keep the unrotated query and key alive
        params, scale = packed_seq_params, self.softmax_scale
        own, channels = value.size(-1), max(query.size(-1), value.size(-1))
        if own != query.size(-1):
            scale = query.size(-1) ** -0.5 if scale is None else scale
            query, key, value = (F.pad(x, (0, channels - x.size(-1))) for x in (query, key, value))
        attend: Callable[..., Tensor] = partial(tree_attention, layout=params.plan)
        if params.share is not None:
            attend = params.share.attend
        out = attend(
            query,
            key,
            value,
            backend=self.backend,
            scale=scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.softmax_offset,
            fuses_sums=self.fuses_sums,
        )
        return out[..., :own].flatten(1).unsqueeze(1)
