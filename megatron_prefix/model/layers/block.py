"""Layers of families that differ from Llama: norms after attention and feed-forward network,
scaled residuals, both parts in parallel, biases of some linear layers.

    before     h + f(norm(h))                  Llama
    after      h + norm(f(h))                  OLMo 2
    both       h + norm(f(norm(h)))            Gemma 2, GLM-4
    parallel   h + attention(norm(h)) + mlp(norm(h))     Command-R

Megatron-Core's layer builds and holds the parts, so that names and checkpoints are its own; this
one adds what it lacks and connects them. Shapes: T tokens, C hidden channels.
"""

from __future__ import annotations

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_prefix.attention import TreePackedSeqParams
from megatron_prefix.config.parts import Architecture
from megatron_prefix.model.layers.norm import LayerNorm, NormByHead, RMSNorm, WideNorm


def norm_class(parts: Architecture) -> type:
    """The norm of hidden states."""
    return LayerNorm if parts.normalization == "layer" else RMSNorm


class FamilyLayer(TransformerLayer):
    """A transformer layer with the parts of `config.architecture`."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config, attention = self.config, self.self_attention
        parts = self.parts = config.architecture
        self.post_self_attn_layernorm, self.post_mlp_layernorm = IdentityOp(), IdentityOp()
        if parts.norms != "before":
            made = [
                norm_class(parts)(config, config.hidden_size, config.layernorm_epsilon)
                for _ in range(2)
            ]
            self.post_self_attn_layernorm, self.post_mlp_layernorm = made
        if parts.qk_norm != "none":
            norm = WideNorm if parts.qk_norm == "wide" else NormByHead
            heads = attention.num_attention_heads_per_partition
            groups = attention.num_query_groups_per_partition
            attention.q_layernorm, attention.k_layernorm = (
                norm(count, config.kv_channels, config.layernorm_epsilon, self.pg_collection.tp)
                for count in (heads, groups)
            )
        # Megatron-Core has one switch for the biases of all linear layers
        if config.add_bias_linear and parts.latent is None:
            if not config.add_qkv_bias:
                attention.linear_qkv.bias = None
            if not parts.output_bias:
                attention.linear_proj.bias = None
        if config.add_bias_linear:
            if not (parts.mlp_bias or config.num_moe_experts):
                self.mlp.linear_fc1.bias = self.mlp.linear_fc2.bias = None

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        packed_seq_params: TreePackedSeqParams,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T, 1, C] -> [T, 1, C], and None where Megatron-Core has a context.

        The other arguments, for masks, cross-attention and inference, are None and not used.
        """
        parts = self.parts
        normed = self.input_layernorm(hidden_states)
        attended = _with_bias(
            self.self_attention(normed, attention_mask=None, packed_seq_params=packed_seq_params)
        )
        attended = self.post_self_attn_layernorm(attended)
        if parts.residual_multiplier != 1:
            attended = attended * parts.residual_multiplier
        hidden_states = hidden_states + attended
        if not parts.parallel_layers:
            normed = self.pre_mlp_layernorm(hidden_states)
        output = self.post_mlp_layernorm(_with_bias(self.mlp(normed)))
        if parts.residual_multiplier != 1:
            output = output * parts.residual_multiplier
        return hidden_states + output, None


def _with_bias(output_and_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = output_and_bias
    return output if bias is None else output + bias
