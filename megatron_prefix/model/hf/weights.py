"""Hugging Face's tensors <-> Megatron-Core's parameters, one tensor at a time.

Megatron-Core fuses tensors that are separate in Hugging Face. With query heads q, key heads k and
value heads v in two groups, and gate g and up-projection u:

    linear_qkv   q0 q1 k0 v0 | q2 q3 k1 v1        one group after another
    linear_fc1   g | u

The experts of a mixture are separate in both. Mixtral and Qwen3-MoE name the parts of a layer
differently; only Qwen3-MoE has query-key norms, which tells the two apart.

Every slice that a tensor-parallel rank owns is a slice of each Hugging Face tensor, so a rank
reads its own rows and columns only. Names are canonical (model/names.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.config import ModelSizes
from megatron_prefix.model.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    REWARD_HEAD,
    SINKS,
    TRANSFORMER_ENGINE_NAMES,
    VOCABULARY,
    layer_and_part,
)

Read = Callable[[str, slice, slice], Tensor]
"""`read(name, rows, columns)`: that part of a Hugging Face tensor; a vector has only rows."""

ALL = slice(None)
_CHECKPOINT_NAMES = {local: fused for fused, local in TRANSFORMER_ENGINE_NAMES.items()}
_OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    OUTPUT_LAYER: "lm_head.weight",
    REWARD_HEAD: REWARD_HEAD,
}
"""Parameters outside of the layers, and their names in Hugging Face."""
_QKV_WEIGHT, _QKV_BIAS = "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"
_FC1 = "mlp.linear_fc1.weight"
_INNER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    _QKV_WEIGHT: tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    _QKV_BIAS: tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    SINKS: ("self_attn.sinks",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    _FC1: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_ROUTER = "mlp.router.weight"
_DENSE = (_FC1, "mlp.linear_fc2.weight")
_SPLIT_COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(.+)|(.+\.weight)(\d+))")
"""An expert of this rank: a module each, or Transformer Engine's `linear_fc1.weight0`."""
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
_CHECKPOINT_EXPERT = "mlp.experts.experts."
_MIXTRAL = {"gate": "gate", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclass(frozen=True)
class WeightMap:
    """The parameters of one model; `vocab_size` is unpadded, `kind` is `lm` or `reward`, and
    `num_labels` are the scores of a reward model."""

    sizes: ModelSizes
    vocab_size: int
    kind: str = "lm"
    num_labels: int = 1

    def names(self) -> list[str]:
        """Canonical names of all parameters, from the embedding to the head."""
        sizes = self.sizes
        absent = set() if sizes.add_qkv_bias else {_QKV_BIAS}
        if not sizes.qk_layernorm:
            absent |= {f"self_attention.{x}_layernorm.weight" for x in "qk"}
        if sizes.softmax_type != "learnable":
            absent.add(SINKS)
        if sizes.num_moe_experts:
            absent |= set(_DENSE)
        inner = [part for part in _INNER if part not in absent]
        if sizes.num_moe_experts:
            # every expert has the two matrices of a dense layer
            own = [part.removeprefix("mlp.") for part in _DENSE]
            inner += [_ROUTER]
            inner += [f"mlp.experts.{e}.{x}" for e in range(sizes.num_moe_experts) for x in own]
        layers = [f"decoder.layers.{i}.{part}" for i in range(sizes.num_layers) for part in inner]
        head = [OUTPUT_LAYER] if sizes.untie_embeddings_and_output_weights else []
        head = [REWARD_HEAD] if self.kind == "reward" else head
        return [EMBEDDING, *layers, "decoder.final_layernorm.weight", *head]

    def hf_names(self, name: str) -> tuple[str, ...]:
        """The Hugging Face tensors that a canonical parameter is made of, in order."""
        if name in _OUTER:
            return (_OUTER[name],)
        layer, part = layer_and_part(name)
        expert = _EXPERT.fullmatch(part)
        if not expert and part != _ROUTER:
            return tuple(f"model.layers.{layer}.{theirs}" for theirs in _INNER[part])
        block, renamed = ("mlp", {}) if self.sizes.qk_layernorm else ("block_sparse_moe", _MIXTRAL)
        prefix = f"model.layers.{layer}.{block}"
        if expert:
            prefix = f"{prefix}.experts.{expert[1]}"
            owners = [theirs.split(".")[1] for theirs in _INNER[f"mlp.{expert[2]}"]]
        else:
            owners = ["gate"]
        return tuple(f"{prefix}.{renamed.get(owner, owner)}.weight" for owner in owners)

    def checkpoint_key(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The place of a canonical parameter in a distributed checkpoint: its key, its index along
        the leading axes, and their lengths.

        All layers are in one tensor under Transformer Engine's name:
        `decoder.layers.2.input_layernorm.weight` is (2,) of (num_layers,) in
        `decoder.layers.self_attention.linear_qkv.layer_norm_weight`, and
        `decoder.layers.2.mlp.experts.5.linear_fc2.weight` is (2, 5) of (num_layers, experts) in
        `decoder.layers.mlp.experts.experts.linear_fc2.weight`.
        """
        if name in _OUTER:
            return name, (), ()
        layer, part = layer_and_part(name)
        layers, experts = self.sizes.num_layers, self.sizes.num_moe_experts
        if expert := _EXPERT.fullmatch(part):
            key = f"decoder.layers.{_CHECKPOINT_EXPERT}{expert[2]}"
            return key, (layer, int(expert[1])), (layers, experts)
        if not (experts and part == "pre_mlp_layernorm.weight"):  # not fused before experts
            part = _CHECKPOINT_NAMES.get(part, part)
        return f"decoder.layers.{part}", (layer,), (layers,)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole canonical parameter, its vocabulary unpadded."""
        first, *others = [self._hf_shape(part) for part in self.hf_names(name)]
        return (first[0] + sum(shape[0] for shape in others), *first[1:])

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all Hugging Face tensors of the model, by name."""
        parts = [part for name in self.names() for part in self.hf_names(name)]
        return {part: self._hf_shape(part) for part in parts}

    def read(
        self, name: str, read: Read, rank: int = 0, size: int = 1, padded_vocab_size: int = 0
    ) -> Tensor:
        """A canonical parameter, or the part of it that tensor-parallel rank `rank` of `size` owns.

        The vocabulary is filled up with zeros to `padded_vocab_size` tokens; 0 leaves it as it is.
        """
        parts = self.hf_names(name)
        if name in VOCABULARY:
            return self._read_vocabulary(parts[0], read, rank, size, padded_vocab_size)
        if name in _OUTER:
            return read(parts[0], ALL, ALL)
        _, part = layer_and_part(name)
        part = _EXPERT.sub(r"mlp.\2", part)
        if part == SINKS:
            return read(parts[0], self._share(self.sizes.num_attention_heads, rank, size), ALL)
        if part in _SPLIT_COLUMNS:
            return read(parts[0], ALL, self._share(self._hf_shape(parts[0])[1], rank, size))
        if part not in (_QKV_WEIGHT, _QKV_BIAS, _FC1):
            return read(parts[0], ALL, ALL)
        rows = [self._share(self._hf_shape(theirs)[0], rank, size) for theirs in parts]
        tensors = [read(theirs, own, ALL) for theirs, own in zip(parts, rows, strict=True)]
        if part == _FC1:
            return torch.cat(tensors)
        # q [q0 q1 q2 q3], k [k0 k1], v [v0 v1] -> [[q0 q1 k0 v0], [q2 q3 k1 v1]] -> one axis
        groups = self.sizes.num_query_groups // size
        grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """A whole canonical parameter as Hugging Face's tensors by name; the inverse of `read`."""
        parts = self.hf_names(name)
        if len(parts) == 1:
            return {parts[0]: parameter[: self._hf_shape(parts[0])[0]]}
        # 4 query heads and 2 groups of one channel: rows [q0 q1 k0 v0 | q2 q3 k1 v1] are cut in
        # each group after 2, 1 and 1 rows, which gives q [q0 q1 q2 q3], k [k0 k1], v [v0 v1].
        groups = 1 if name.endswith("linear_fc1.weight") else self.sizes.num_query_groups
        lengths = [self._hf_shape(part)[0] // groups for part in parts]
        grouped = parameter.reshape(groups, -1, *parameter.shape[1:])
        tensors = [x.flatten(0, 1) for x in grouped.split(lengths, dim=1)]
        return dict(zip(parts, tensors, strict=True))

    def _hf_shape(self, part: str) -> tuple[int, ...]:
        sizes, head_dim = self.sizes, self.sizes.kv_channels
        query, key = sizes.num_attention_heads * head_dim, sizes.num_query_groups * head_dim
        hidden, ffn = sizes.hidden_size, sizes.ffn_hidden_size
        if ".experts." in part:
            ffn = sizes.moe_ffn_hidden_size
        owner, kind = part.split(".")[-2:]
        if kind == "sinks":
            return (sizes.num_attention_heads,)
        if owner in ("q_norm", "k_norm"):
            return (head_dim,)
        rows, columns = {
            "embed_tokens": (self.vocab_size, hidden),
            "lm_head": (self.vocab_size, hidden),
            "score": (self.num_labels, hidden),
            "q_proj": (query, hidden),
            "k_proj": (key, hidden),
            "v_proj": (key, hidden),
            "o_proj": (hidden, query),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
            "w1": (ffn, hidden),
            "w2": (hidden, ffn),
            "w3": (ffn, hidden),
            "gate": (sizes.num_moe_experts, hidden),
        }.get(owner, (hidden, 0))
        return (rows,) if kind == "bias" or not columns else (rows, columns)

    def _read_vocabulary(
        self, part: str, read: Read, rank: int, size: int, padded_vocab_size: int
    ) -> Tensor:
        """A rank's tokens of the vocabulary: 10 padded to 12, over 2 ranks: 0 to 5, and 6 to 9
        with two rows of zeros."""
        # `stop` is before `own.start` on a rank that has only padding
        own = self._share(padded_vocab_size or self.vocab_size, rank, size)
        stop = min(own.stop, self.vocab_size)
        tensor = read(part, slice(min(own.start, stop), stop), ALL)
        missing = own.stop - own.start - len(tensor)
        if not missing:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    @staticmethod
    def _share(total: int, rank: int, size: int) -> slice:
        assert total % size == 0, f"{total} rows or columns over {size} tensor-parallel ranks"
        return slice(total // size * rank, total // size * (rank + 1))
