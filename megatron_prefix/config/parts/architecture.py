"""What a model's layers consist of, besides their sizes.

The defaults are those of Llama. Other families differ in some of these parts, and model/hf/
families.py lists in which. They are read from a Hugging Face directory; the model section of a
configuration has no keys for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import (
    KNOWN_KEYS,
    Count,
    Heads,
    NoneOrLayers,
    NoneOrWidth,
    NonNegative,
    Positive,
    RotaryBase,
    Switch,
)
from megatron_prefix.config.parts.latent import LatentAttention
from megatron_prefix.config.parts.rope import RopeScaling
from megatron_prefix.config.parts.routing import Routing

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
"""`gelu` is exact, `gelu_tanh` its approximation by tanh, `quick_gelu` x sigmoid(1.702 x)."""
Rotary = Literal["global", "local", "none"]
"""Angles by `ModelSizes.rotary_base`, by `Architecture.local_rotary_base`, or no rotation."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class Architecture:
    """Parts of a model's layers; the defaults are Llama's."""

    normalization: Literal["rms", "layer"] = "rms"
    """`rms`: divide by the root mean square; `layer`: subtract the mean first."""
    norm_bias: Switch = False
    norm_adds_one: Switch = False
    """Norms multiply by 1 + weight (Gemma)."""
    norms: Literal["before", "after", "both"] = "before"
    """Norms of a layer: of the input of attention and feed-forward layer, of their outputs, or of
    both (sandwich norms)."""
    qk_norm: Literal["none", "wide", "by head"] = "none"
    """Norms of queries and keys besides `qk_layernorm`, which is over each head with one weight.
    `wide`: root mean square over all heads of a token (OLMo 2); `by head`: layer norm over each
    head, which has its own weight (Command-R)."""
    parallel_layers: Switch = False
    """Attention and feed-forward layer have the same input, and both are added (Command-R)."""
    activation: Activation = "silu"
    gated_linear_unit: Switch = True
    gate_limit: Positive | None = None
    """Gates are at most this, and what they gate is between minus this and this (gpt-oss)."""
    linear_offset: NonNegative = 0.0
    """Added to what gates multiply."""
    output_bias: Switch = False
    """A bias after the output projection of attention."""
    mlp_bias: Switch = False
    """Biases in both linear layers of the feed-forward network."""
    rotary_channels: Heads | None = None
    """The first channels of a head that are rotated; None: all."""
    rotary_interleaved: Switch = False
    """Neighbouring channels are rotated together; otherwise channel i and i + half."""
    rotary: tuple[Rotary, ...] = ()
    """The rotation of each layer; empty: `global` in all."""
    local_rotary_base: RotaryBase | None = None
    local_rope_scaling: RopeScaling | None = None
    rotary_sections: tuple[Count, ...] | None = None
    """Pairs of channels that rotate by a token's position in time, in height and in width, one
    after another (M-RoPE); None: every pair rotates by the one position of the token."""
    query_growth: Positive | None = None
    """Queries at position p are multiplied by 1 + b log(1 + floor(p / length)); this is b, and
    `query_growth_length` the length in tokens (Ministral 3)."""
    query_growth_length: Count | None = None
    softmax_scale: Positive | None = None
    """Factor of attention's scores; None: 1 / sqrt(channels of a head)."""
    embedding_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    """Factor of what attention and feed-forward network add to the hidden states."""
    logits_multiplier: Positive = 1.0
    final_logit_softcapping: Positive | None = None
    """Logits are c tanh(logits / c), after `logits_multiplier`."""
    expert_bias: Switch = False
    """Biases in both linear layers of each expert, and in the router."""
    shared_expert_size: NoneOrWidth = 0
    """Channels of a feed-forward network that every token goes through beside its experts."""
    shared_expert_gate: Switch = False
    """The output of the shared expert is multiplied by the sigmoid of a linear map of its input."""
    latent: LatentAttention | None = None
    """Multi-latent attention; None: each head has its own projections of the hidden states."""
    routing: Routing | None = None
    """How tokens choose experts; None: by a softmax, as the sizes say."""
    dense_layers: NoneOrLayers = 0
    """First layers of a mixture, which have one feed-forward network in place of experts."""

    def faults(self) -> Iterator[str]:
        """Parts that do not fit each other."""
        if ("local" in self.rotary) != (self.local_rotary_base is not None):
            yield "architecture.local_rotary_base is for layers with local rotation, and only these"
        if (self.query_growth is None) != (self.query_growth_length is None):
            yield "architecture.query_growth and query_growth_length need each other"
        if self.parallel_layers and self.norms != "before":
            yield f"architecture.parallel_layers with norms = {self.norms} is not supported"
        if self.expert_bias and self.shared_expert_size:
            yield "architecture.expert_bias with a shared expert is not supported"

    @property
    def is_plain(self) -> bool:
        """Whether all parts are Llama's, which Transformer Engine's layers have. It does not matter
        by which positions queries and keys are rotated."""
        return replace(self, rotary_sections=None) == Architecture()
