"""The settings of the lora section.

A frozen matrix W gets two small ones, A [r, in] and B [out, r], which are trained (Hu et al. 2021,
arXiv 2106.09685, section 4.1):

    y = W x + lora_alpha / r * B A x

Names and defaults are those of PEFT's `LoraConfig`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import KNOWN_KEYS, Factor, PathText, Switch

Target = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
]
ALL_LINEAR: Literal["all-linear"] = "all-linear"
ATTENTION_TARGETS: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_TARGETS: tuple[Target, ...] = ("gate_proj", "up_proj", "down_proj")
TARGETS = ATTENTION_TARGETS + FEED_FORWARD_TARGETS
"""Linear layers that can be adapted, in the order of a layer."""
LATENT_TARGETS: tuple[Target, ...] = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""Those that only multi-latent attention has."""
RANK, ALPHA = 8, 8.0
"""PEFT's defaults of `r` and `lora_alpha`."""


def _refuse_dropout(value: float) -> float:
    if value:
        raise ValueError(
            "dropout on an adapter's input would be drawn once for a prompt that is shared and "
            "once for each response if it is not, so sharing would change what is learned: leave "
            "it out, or set 0"
        )
    return value


def _refuse_repeats(values: tuple) -> tuple:
    if not values or len(set(values)) < len(values):
        raise ValueError("expected at least one entry, and none twice; leave the setting out")
    return values


Targets = Annotated[tuple[Target, ...], AfterValidator(_refuse_repeats)]
Saved = Annotated[tuple[Literal["embed_tokens", "lm_head"], ...], AfterValidator(_refuse_repeats)]
LayerIndex = Annotated[int, Field(strict=True, ge=0, lt=10**4)]
LayerIndices = Annotated[tuple[LayerIndex, ...], AfterValidator(_refuse_repeats)]


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class LoraConfig:
    """Low-rank adapters; the model's own weights are frozen.

    With `adapter`, what is None comes from the adapter, else it has PEFT's default.
    """

    r: Annotated[int, Field(strict=True, ge=1, le=2**14)] | None = None
    """Rank of an adapter: rows of A, columns of B. 8 if not given."""
    lora_alpha: Factor | None = None
    """An adapter's output is multiplied by `lora_alpha / r`. 8 if not given."""
    target_modules: Literal["all-linear"] | Targets | None = None
    """Linear layers of every transformer layer that get an adapter. `all-linear` (if not given):
    all of them, of a mixture those of the attention; its experts are adapted if they are named.
    Those of multi-latent attention have to be named."""
    use_rslora: Switch | None = None
    """Multiply by `lora_alpha / sqrt(r)` instead (Kalajdzievski 2023, arXiv 2312.03732)."""
    lora_dropout: Annotated[
        float, Field(strict=True, ge=0, le=1), AfterValidator(_refuse_dropout)
    ] = 0.0
    """Only 0: another value would make sharing change what is learned."""
    layers_to_transform: LayerIndices | None = None
    """Transformer layers that get adapters, counted from 0; all if not given."""
    adapter: PathText | None = None
    """Adapter to start from: a PEFT directory, or a checkpoint of a run with adapters."""
    modules_to_save: Saved | None = None
    """Matrices of the vocabulary that are trained whole; the frozen originals stay beside them."""
    reference: Literal["base", "start"] | None = None
    """With `adapter`, the reference model: the frozen model without adapters (`base`, if not
    given), or with the adapter as it was at the start."""

    @property
    def scale(self) -> float:
        """What the product B A x is multiplied by."""
        rank, alpha = self.r or RANK, self.lora_alpha or ALPHA
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    @property
    def starts_as_reference(self) -> bool:
        """Whether the model at the first step is the reference model."""
        return self.adapter is None or self.reference == "start"

    def resolved(self, has_experts: bool, num_layers: int | None = None) -> LoraConfig:
        """The same with every default written out, and the names that `all-linear` means; all of
        `num_layers` layers are None, if that is given."""
        targets, layers = self.target_modules or ALL_LINEAR, self.layers_to_transform
        if targets == ALL_LINEAR:
            # transformers keeps experts as one parameter with three axes, not as linear layers
            targets = ATTENTION_TARGETS if has_experts else TARGETS
        if layers is not None and set(layers) == set(range(num_layers or 0)):
            layers = None
        return replace(
            self,
            r=self.r or RANK,
            lora_alpha=self.lora_alpha or ALPHA,
            target_modules=tuple(x for x in (*TARGETS, *LATENT_TARGETS) if x in targets),
            use_rslora=bool(self.use_rslora),
            layers_to_transform=layers and tuple(sorted(layers)),
        )

    def adapts_layer(self, index: int) -> bool:
        """Whether a transformer layer, counted from 0, has adapters."""
        return self.layers_to_transform is None or index in self.layers_to_transform
