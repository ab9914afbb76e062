"""The parameters of adapters: their names, shapes, and the tensors of Hugging Face that they adapt.

An adapter belongs to one part of a linear layer, in Hugging Face and here:

    decoder.layers.2.self_attention.linear_qkv.adapters.k_proj.lora_A     [r, in]
    decoder.layers.2.self_attention.linear_qkv.adapters.k_proj.lora_B     [out, r]
    adapts the rows of model.layers.2.self_attn.k_proj.weight             [out, in]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.model.hf.names import (
    EXPERT_FC1,
    EXPERT_FC2,
    FC1,
    FC2,
    KV_DOWN,
    KV_UP,
    PROJ,
    Q_DOWN,
    Q_PROJ,
    Q_UP,
    QKV,
)
from megatron_prefix.model.hf.peft.directory import part_name, peft_name
from megatron_prefix.model.hf.weights import ALL, Piece, Read, WeightMap
from megatron_prefix.model.names import (
    ADAPTERS,
    EMBEDDING,
    OUTPUT_LAYER,
    REWARD_HEAD,
    SAVED_EMBEDDING,
    SAVED_OUTPUT_LAYER,
    layer_and_part,
)

_FEED_FORWARD = {FC1: ("gate_proj", "up_proj"), FC2: ("down_proj",)}
_PARTS = {
    QKV: ("q_proj", "k_proj", "v_proj"),
    Q_PROJ: ("q_proj",),
    Q_DOWN: ("q_a_proj",),
    Q_UP: ("q_b_proj",),
    KV_DOWN: ("kv_a_proj_with_mqa",),
    KV_UP: ("kv_b_proj",),
    PROJ: ("o_proj",),
    **_FEED_FORWARD,
    EXPERT_FC1: _FEED_FORWARD[FC1],
    EXPERT_FC2: _FEED_FORWARD[FC2],
}
"""Targets of the parts of each linear layer, in order."""
_COPIES = {
    "embed_tokens": (SAVED_EMBEDDING, EMBEDDING),
    "lm_head": (SAVED_OUTPUT_LAYER, OUTPUT_LAYER),
}
"""Whole copies that are trained, and what they replace."""
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class AdapterMap:
    """The trained parameters of a model with adapters; `lora` is resolved, `base` has the model."""

    lora: LoraConfig
    base: WeightMap

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        """What each adapter adapts; its factors have its name and `.lora_A`, `.lora_B`."""
        adapters: dict[str, Piece] = {}
        for name in self.base.names():
            if not name.startswith("decoder.layers.") or not name.endswith(".weight"):
                continue
            layer, part = layer_and_part(name)
            module = _EXPERT_NUMBER.sub(".experts.", part).removesuffix(".weight")
            own = [x in (self.lora.target_modules or ()) for x in _PARTS.get(module, ())]
            if any(own) and self.lora.adapts_layer(layer):
                parts = zip(_PARTS[module], own, self.base.pieces(name), strict=True)
                stem = name.removesuffix(".weight")
                adapters |= {f"{stem}{ADAPTERS}{x}": piece for x, is_own, piece in parts if is_own}
        return adapters

    @property
    def has_experts(self) -> bool:
        """Whether an adapter is one of an expert."""
        return any(_EXPERT_NUMBER.search(name) for name in self.pieces)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by canonical name, the vocabulary unpadded."""
        rank = self.lora.r
        assert rank is not None
        shapes: dict[str, tuple[int, ...]] = {}
        for adapter, piece in self.pieces.items():
            shapes[f"{adapter}.lora_A"] = (rank, piece.columns)
            shapes[f"{adapter}.lora_B"] = (piece.rows, rank)
        for module in self.lora.modules_to_save or ():
            copy, original = _COPIES[module]
            shapes[copy] = self.base.shape(original)
        if self.base.kind == "reward":
            shapes[REWARD_HEAD] = self.base.shape(REWARD_HEAD)
        return shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def checkpoint_key(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """A checkpoint has every parameter under its canonical name."""
        return name, (), ()

    def hf_names(self, name: str) -> tuple[str, ...]:
        """PEFT's name. Raises InputError for an adapter of an expert."""
        return (peft_name(name),)

    def file_name(self, name: str) -> str:
        """The name in a PEFT directory of a canonical parameter. Raises InputError for an adapter
        of an expert."""
        return peft_name(name) if self.base.images is None else part_name(peft_name(name))

    def read(self, name: str, read: Read) -> Tensor:
        return read(peft_name(name), ALL, ALL)

    def merged(self, tensor: str, base: Tensor, parameter: Callable[[str], Tensor]) -> Tensor:
        """A Hugging Face tensor of the base with everything that is trained in it, in its
        precision: W + scale * B A. `parameter` gives a canonical parameter; `base` is written.

        Computed in float32, as PEFT's `merge_and_unload` does.
        """
        if tensor in self._copies:
            return parameter(self._copies[tensor]).to(base.dtype)
        for adapter in self._adapters_of.get(tensor, ()):
            piece = self.pieces[adapter]
            down, up = (parameter(f"{adapter}.lora_{x}").float() for x in "AB")
            rows = base[piece.start : piece.start + piece.rows]
            if piece.expert is not None:
                rows = piece.of_expert(base)
            rows += up @ down * self.lora.scale
        return base

    @cached_property
    def _adapters_of(self) -> dict[str, list[str]]:
        """The adapters of each Hugging Face tensor."""
        adapters: dict[str, list[str]] = {}
        for adapter, piece in self.pieces.items():
            adapters.setdefault(piece.tensor, []).append(adapter)
        return adapters

    @cached_property
    def _copies(self) -> dict[str, str]:
        """The trained copy, or the head, of each Hugging Face tensor that one replaces."""
        originals = {copy: original for copy, original in _COPIES.values()}
        whole = [name for name in self.shapes if ADAPTERS not in name]
        return {self.base.pieces(originals.get(name, name))[0].tensor: name for name in whole}
