"""The model: its sizes, and the settings of the model section.

    ModelConfig    what a user writes; sizes are optional, `hf` or `checkpoint` may give them
    ModelSizes     what the code works with; every size is known

`ModelConfig.sizes` makes the second from the first, model/hf/config.py from a `config.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import (
    KNOWN_KEYS,
    MOST_CHANNELS,
    Count,
    Epsilon,
    Factor,
    Heads,
    Labels,
    Layers,
    NoneOrHeads,
    NoneOrWidth,
    NonNegative,
    PathText,
    Positive,
    RotaryBase,
    Switch,
    Width,
    WindowSize,
)
from megatron_prefix.config.fp8 import DEFAULT_RECIPE, ROWS
from megatron_prefix.config.parts import Architecture, RopeScaling
from megatron_prefix.config.vision import VisionConfig
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class ModelSizes:
    """The sizes of a model, all of them known; names and meaning are those of `ModelConfig`."""

    num_layers: Layers
    hidden_size: Width
    ffn_hidden_size: Width
    num_attention_heads: Heads
    num_query_groups: Heads
    """Key-value heads."""
    kv_channels: Heads
    """Channels of a head."""
    rotary_base: RotaryBase = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: Epsilon = 1e-5
    add_qkv_bias: Switch = False
    qk_layernorm: Switch = False
    untie_embeddings_and_output_weights: Switch = True
    num_moe_experts: NoneOrHeads = 0
    """Experts of every layer; 0 for a model without experts."""
    moe_router_topk: Heads = 2
    moe_ffn_hidden_size: NoneOrWidth = 0
    """Channels of an expert; 0 for a model without experts."""
    moe_router_pre_softmax: Switch = False
    window_size: WindowSize | None = None
    window_attn_skip_freq: tuple[Literal[0, 1], ...] | None = None
    """1 for each layer with the window, 0 for each without; None: all layers have it."""
    attn_logit_softcapping: Factor | None = None
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    architecture: Architecture = Architecture()
    """Parts that a Hugging Face directory may have besides; the model section has none of them."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the tokens that a token sees along its root path, itself included; None:
        all of them."""
        if self.window_size is None:
            return (None,) * self.num_layers
        kinds = self.window_attn_skip_freq or (1,) * self.num_layers
        return tuple(self.window_size[0] + 1 if kind else None for kind in kinds)

    @property
    def kernel_channels(self) -> int:
        """Channels of the heads that attention computes with: multi-latent attention fills up the
        smaller of keys and values with zeros."""
        latent = self.architecture.latent
        return max(self.kv_channels, latent.value_channels if latent is not None else 0)

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.architecture.dense_layers if self.num_moe_experts else 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return self.num_moe_experts > 0 and layer >= self.architecture.dense_layers

    def faults(self) -> Iterator[str]:
        """Sizes that do not fit each other."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads % groups:
            yield (
                f"model.num_attention_heads = {heads} is not a multiple of "
                f"model.num_query_groups = {groups}"
            )
        if self.kv_channels % 2:
            yield (
                f"a head of {self.kv_channels} channels is odd and rotary embedding rotates "
                "pairs: change model.hidden_size or model.kv_channels"
            )
        yield from self.architecture.faults()
        if (routing := self.architecture.routing) is not None and self.num_moe_experts:
            yield from routing.faults(self.num_moe_experts, self.moe_router_topk)
        scalings = (self.rope_scaling, self.architecture.local_rope_scaling)
        pairs = (self.architecture.rotary_channels or self.kv_channels) // 2
        for scaling in scalings:
            if scaling and scaling.short_factor and len(scaling.short_factor) != pairs:
                yield (
                    f"model.rope_scaling.short_factor has {len(scaling.short_factor)} numbers, and "
                    f"a head has {counted(pairs, 'pair')} of channels that are rotated: give one "
                    "for each"
                )
        kinds = self.window_attn_skip_freq
        if kinds is None:
            return
        if self.window_size is None:
            yield (
                f"model.window_attn_skip_freq = {kinds} without model.window_size: give both, or "
                "neither"
            )
        elif len(kinds) != self.num_layers or 1 not in kinds:
            yield (
                f"model.window_attn_skip_freq = {kinds} needs one entry for each of "
                f"model.num_layers = {self.num_layers} layers, and a 1 for at least one of them"
            )


SIZES = tuple(field.name for field in fields(ModelSizes) if field.name != "architecture")
"""Settings of the model section that `model.hf` or an imported `model.checkpoint` gives."""
KERNELS = {
    "apply_rope_fusion": "rotary",
    "bias_swiglu_fusion": "gate",
    "cross_entropy_loss_fusion": "head",
    "key_sum_fusion": "key_sums",
}
REQUIRED_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class ModelConfig:
    """Where the model comes from or its sizes, precision, attention and recomputation."""

    kind: Literal["lm", "reward"] = "lm"
    """`lm`: a language model, trained as a policy; `reward`: a scalar head on each response's
    last token. A reward model may start from a language model; its head is then drawn."""
    num_labels: Labels = 1
    """Scores that a reward model gives each response, one for each attribute of the data."""
    hf: PathText | None = None
    """Hugging Face model (directory or id) that gives sizes and weights to policy and
    reference; docs/models.md has the families. No size may be given with it."""
    checkpoint: PathText | None = None
    """Distributed checkpoint whose weights the policy and the reference start from. Sizes may
    be left out if `convert import` wrote it. Without it and `hf`, both start from weights drawn
    from `train.seed`."""
    allow_other_tokenizer: Switch = False
    """Take data sets that were built with another vocabulary than that of the model's tokenizer."""
    num_layers: Layers | None = None
    hidden_size: Width | None = None
    ffn_hidden_size: Width | None = None
    num_attention_heads: Heads | None = None
    num_query_groups: Heads | None = None
    """Key-value heads; by default as many as `num_attention_heads`."""
    kv_channels: Heads | None = None
    """Channels of a head; by default `hidden_size / num_attention_heads`."""
    rotary_base: RotaryBase = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: Epsilon = 1e-5
    add_qkv_bias: Switch = False
    qk_layernorm: Switch = False
    """RMSNorm over each query and key head before rotation."""
    untie_embeddings_and_output_weights: Switch = True
    num_moe_experts: Heads | None = None
    """Experts of every layer, in place of one feed-forward network."""
    moe_router_topk: Heads = 2
    """Experts that each token is sent to."""
    moe_ffn_hidden_size: Width | None = None
    """Channels of an expert; by default `ffn_hidden_size`."""
    moe_router_pre_softmax: Switch = False
    """Weigh the chosen experts by their probability among all experts; without it, among the
    chosen ones."""
    window_size: WindowSize | None = None
    """Sliding window as [tokens before, tokens after] of a token, after is always 0: with [4095, 0]
    a token sees itself and 4095 tokens before it on its root path. transformers' `sliding_window`
    4096 is [4095, 0]. Without it every layer sees the whole path."""
    window_attn_skip_freq: tuple[Literal[0, 1], ...] | None = None
    """1 for each layer with the window, 0 for each without. By default all layers have it."""
    attn_logit_softcapping: Factor | None = None
    """Bound c of attention scores s, which become c tanh(s / c)."""
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    """`learnable`: each query head has a sink, one more score in the softmax without a value;
    `off-by-one`: the sinks are 0 and not learned."""
    moe_aux_loss_coeff: NonNegative = 0.0
    """Weight of the auxiliary loss that spreads tokens over experts; see docs/design.md."""
    moe_count: Literal["tokens", "responses"] = "tokens"
    """How often the auxiliary loss counts a token: once (`tokens`), or once for each of the
    `responses` that share it, as if each ran alone."""
    init_method_std: Positive = 0.02
    """Standard deviation of drawn weights; output projections are scaled by 1/sqrt(2 layers)."""
    make_vocab_size_divisible_by: Width = 64
    """The embedding is padded with zero rows, never predicted, to a multiple of this."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Multiply the matrices of layers in FP8, by Transformer Engine: `e4m3`, or `hybrid` with e5m2
    for gradients. Attention, the embedding and the head stay bfloat16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """Scales of FP8: one per tensor from earlier steps (`delayed`) or from the tensor itself
    (`tensorwise`, the default with `fp8`), or one per block of 128 (`blockwise`) or 32 (`mxfp8`)
    values; see docs/gpu.md."""
    first_last_layers_bf16: Switch = False
    """The first and the last layer stay bfloat16; not with `delayed`."""
    attention_backend: Literal["auto", "dense", "path", "flash", "te", "flex"] = "auto"
    """`dense` and `path` run anywhere; `flash`, `te` (Transformer Engine) and `flex`
    (FlexAttention) need CUDA; `auto` chooses by attention/auto_table.json."""
    flash_version: Literal["auto", 2, 3, 4] = "auto"
    """FlashAttention that `attention_backend: flash` calls: torch's own 2, or 3 or 4 if they are
    installed; `auto` is 3 on Hopper if that is installed, else 2."""
    vision: VisionConfig | None = None
    """What is trained of the part that reads images, of models that have one."""
    lm_head_chunk_size: Count = 2048
    """Tokens projected to logits at a time; if there are more, backward projects them again."""
    apply_rope_fusion: Switch = False
    """Rotate queries and keys by one Triton kernel; needs CUDA."""
    bias_swiglu_fusion: Switch = False
    """The gate of feed-forward layers (SwiGLU) in one Triton kernel; needs CUDA. For layers without
    Transformer Engine, which fuses it by itself, and without experts."""
    cross_entropy_loss_fusion: Switch = False
    """Log-probabilities of targets by Triton kernels that read the logits once and keep no float32
    copy of them; needs CUDA."""
    key_sum_fusion: Switch = False
    """Sum the gradients of keys that `flash` and `te` copy in one Triton kernel; needs CUDA."""
    recompute_granularity: Literal["selective", "full"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Layers | None = None

    @property
    def recipe(self) -> str | None:
        """The recipe of FP8, if there is one."""
        return None if self.fp8 is None else self.fp8_recipe or DEFAULT_RECIPE

    @property
    def token_multiple(self) -> int:
        """A rank's tokens of a row are a multiple of this: 1, except in FP8."""
        return 1 if self.recipe is None else ROWS[self.recipe]

    @property
    def kernels(self) -> dict[str, str]:
        """Switches for Triton kernels that are on, each with the name of its kernel in
        `TreeTransformerConfig.kernels`."""
        return {key: kernel for key, kernel in KERNELS.items() if getattr(self, key)}

    def sizes(self) -> ModelSizes | None:
        """The sizes that are given here, with the defaults of those that follow from others;
        None if `hf` or an imported checkpoint has them. Raises InputError."""
        if self.num_layers is None:
            return None
        for key in REQUIRED_SIZES:
            if getattr(self, key) is None:
                raise InputError(f"model.{key} is missing: give the model's sizes, or model.hf")
        assert self.hidden_size is not None and self.num_attention_heads is not None
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"model.hidden_size = {self.hidden_size} is not a multiple of "
                f"model.num_attention_heads = {self.num_attention_heads}: change one, or set "
                "model.kv_channels"
            )
        # hidden_size 64, 4 heads -> 4 query groups, 16 channels per head
        given: dict[str, Any] = {key: getattr(self, key) for key in SIZES}
        given["num_query_groups"] = self.num_query_groups or self.num_attention_heads
        given["kv_channels"] = self.kv_channels or self.hidden_size // self.num_attention_heads
        given["num_moe_experts"] = self.num_moe_experts or 0
        given["moe_ffn_hidden_size"] = (
            (self.moe_ffn_hidden_size or self.ffn_hidden_size) if self.num_moe_experts else 0
        )
        if self.window_size and self.window_attn_skip_freq == (1,) * self.num_layers:
            given["window_attn_skip_freq"] = None  # one form for all layers, to compare sizes
        if (channels := given["kv_channels"]) > MOST_CHANNELS:
            raise InputError(
                f"model.hidden_size = {self.hidden_size} and model.num_attention_heads = "
                f"{self.num_attention_heads} give heads of {channels} channels, above "
                f"{MOST_CHANNELS}: change one, or set model.kv_channels"
            )
        return ModelSizes(**given)
