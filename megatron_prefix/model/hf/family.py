"""What a model type is: its names, its parts, and the keys of `config.json` that set a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_prefix.config.parts import Architecture
from megatron_prefix.model.hf import names
from megatron_prefix.model.hf.keys import NO_EFFECT, ONLY, READ, Only
from megatron_prefix.model.hf.names import Names


@dataclass(frozen=True)
class Key:
    """A number or switch of `config.json`, to the power of `power`."""

    name: str
    power: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type: its class in transformers, its parts, and keys that other types lack."""

    architecture: str
    classifier: str | None = None
    """Class of reward models; None: there is none in transformers."""
    names: Names = field(default_factory=lambda: names.LLAMA)
    parts: Architecture = Architecture()
    set_by: Mapping[str, Key] = field(default_factory=dict)
    """Fields of `parts`, and the keys that set them."""
    qkv_bias: bool | str = False
    """Whether there is one, or the key that says so."""
    qk_norm: bool | str = False
    """RMSNorm over each query and key head, or the key that says so."""
    epsilon: str = "rms_norm_eps"
    activation: str = "hidden_act"
    """The key that names it."""
    fixed_activation: Literal["quick_gelu"] | None = None
    """The activation, if no key sets it."""
    sinks: bool = False
    """Whether each query head has a learned sink."""
    experts: str | None = None
    """The key with the number of experts; None: no experts."""
    shared_expert: str | None = None
    """The key with the size of the shared expert."""
    window: Literal["none", "every layer", "layer_types"] = "none"
    """Layers that a `sliding_window` limits."""
    rotary: Literal["one", "by layer type", "no_rope_layers", "sliding layers"] = "one"
    """`by layer type`: full and sliding layers have their own `rope_parameters`; `sliding layers`:
    only these are rotated."""
    head_norm_key: str | None = None
    """The key that switches on `Architecture.qk_norm: by head`."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` is read."""
    rotary_sections: bool = False
    """Whether `rope_parameters.mrope_section` divides the channels among three axes."""
    query_growth: bool = False
    """Whether `rope_parameters` say how queries grow with their position."""
    latent: bool = False
    """Whether attention is multi-latent."""
    routing: Literal["softmax", "sigmoid"] | None = None
    """Scores of experts that are chosen by groups (config/parts/routing.py)."""
    read: frozenset[str] = frozenset()
    no_effect: frozenset[str] = frozenset()
    only_some: Mapping[str, Only] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, str]:
        """Last names of the linear layers in Hugging Face by their part: query, key, value, output,
        gate, up, down. Parts that one tensor joins have the same name. Of multi-latent attention:
        query, or query down and query up; key and value down, key and value up."""
        gated = self.parts.gated_linear_unit
        feed_forward = names.EXPERT_FC1, names.EXPERT_FC2
        if not self.experts:
            feed_forward = names.FC1, names.FC2
        attention: dict[str, tuple[str, ...]] = {names.QKV: ("query", "key", "value")}
        if self.latent:
            attention = {
                names.Q_PROJ: ("query",),
                names.Q_DOWN: ("query down",),
                names.Q_UP: ("query up",),
                names.KV_DOWN: ("key and value down",),
                names.KV_UP: ("key and value up",),
            }
        parts = {
            **attention,
            names.PROJ: ("output",),
            feed_forward[0]: ("gate", "up") if gated else ("up",),
            feed_forward[1]: ("down",),
        }
        linears: dict[str, str] = {}
        for module, own in parts.items():
            tensors = self.names[module]
            joined = tensors if len(tensors) == len(own) else tensors * len(own)
            linears |= {part: x.split(".")[-1] for part, x in zip(own, joined, strict=True)}
        return linears

    @property
    def own(self) -> frozenset[str]:
        """Keys that are read, besides those that all types read."""
        keys = {key.name for key in self.set_by.values()} | {self.epsilon}
        keys |= set() if self.fixed_activation else {self.activation}
        keys |= {self.qkv_bias} if isinstance(self.qkv_bias, str) else set()
        keys |= {self.qk_norm} if isinstance(self.qk_norm, str) else set()
        keys |= {self.shared_expert} if self.shared_expert else set()
        keys |= {self.head_norm_key} if self.head_norm_key else set()
        keys |= {"partial_rotary_factor"} if self.partial_rotary else set()
        return self.read | keys

    @property
    def known(self) -> frozenset[str]:
        """Every key that `config.json` may have."""
        return READ | ONLY.keys() | NO_EFFECT | self.own | self.no_effect | self.only_some.keys()

    @property
    def only(self) -> dict[str, Only]:
        """The keys that are supported with some values only."""
        common = {key: x for key, x in ONLY.items() if key not in self.own | self.no_effect}
        return common | dict(self.only_some)
