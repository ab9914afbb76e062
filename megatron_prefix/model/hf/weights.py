"""Hugging Face's tensors <-> Megatron-Core's parameters, a tensor at a time.

Megatron-Core fuses what Hugging Face keeps apart. With query heads q, key heads k and value
heads v in two groups, and gate g and up-projection u:

    linear_qkv   q0 q1 k0 v0 | q2 q3 k1 v1        a group after another
    linear_fc1   g | u

The experts of a mixture are apart in both. Mixtral calls its layer's parts by other names than
Qwen3-MoE, and the query-key norms, which only the latter has, tell which it is.

Every slice that a tensor-parallel rank owns is a slice of each Hugging Face tensor, so a rank
reads its own rows and columns only. Names are canonical: those of the whole model with
Megatron-Core's local layers (see `canonical_name`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.config.schema import ModelConfig

Read = Callable[[str, slice, slice], Tensor]
"""`read(name, rows, columns)`: that part of a Hugging Face tensor; a vector has only rows."""

ALL = slice(None)
_TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_CHECKPOINT_NAMES = {local: fused for fused, local in _TRANSFORMER_ENGINE_NAMES.items()}
_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    "score.weight": "score.weight",
}
REWARD_HEAD = "score.weight"
"""A reward model's head, under one name in Megatron-Core, in checkpoints and in Hugging Face."""
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_QKV_WEIGHT, _QKV_BIAS = "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"
_FC1 = "mlp.linear_fc1.weight"
_INNER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    _QKV_WEIGHT: tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    _QKV_BIAS: tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    _FC1: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_ROUTER = "mlp.router.weight"
_DENSE = (_FC1, "mlp.linear_fc2.weight")
_SPLIT_COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(.+)|(.+\.weight)(\d+))")
"""An expert of this rank: a module each, or Transformer Engine's `linear_fc1.weight0`."""
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
_CHECKPOINT_EXPERT = "mlp.experts.experts."
_MIXTRAL = {"gate": "gate", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def is_expert(name: str) -> bool:
    """Whether a canonical parameter belongs to one expert of a mixture."""
    return ".mlp.experts." in name


def canonical_name(name: str, layer_offset: int = 0, first_expert: int = 0) -> str:
    """A parameter's name in the whole model with local layers.

    `decoder.layers.0.self_attention.linear_qkv.layer_norm_weight` of Transformer Engine's
    layers, in a stage behind 2 layers, is `decoder.layers.2.input_layernorm.weight`. Expert 1 of
    a rank whose first expert is 4, `….mlp.experts.local_experts.1.linear_fc2.weight`, is
    `….mlp.experts.5.linear_fc2.weight`.
    """
    if not name.startswith("decoder.layers."):
        return name
    layer, rest = _layer_part(name)
    if found := _LOCAL_EXPERT.fullmatch(rest):
        local, own, grouped_own, grouped = found.groups()
        rest = f"mlp.experts.{int(local or grouped) + first_expert}.{own or grouped_own}"
    return f"decoder.layers.{layer + layer_offset}.{_TRANSFORMER_ENGINE_NAMES.get(rest, rest)}"


def _layer_part(name: str) -> tuple[int, str]:
    _, _, layer, rest = name.split(".", 3)
    return int(layer), rest


@dataclass(frozen=True)
class WeightMap:
    """The parameters of one model; `model` has its sizes, `vocab_size` is unpadded."""

    model: ModelConfig
    vocab_size: int

    def names(self) -> list[str]:
        """Canonical names of all parameters, from the embedding to the head."""
        model = self.model
        absent = set() if model.add_qkv_bias else {_QKV_BIAS}
        if not model.qk_layernorm:
            absent |= {f"self_attention.{x}_layernorm.weight" for x in "qk"}
        if model.num_moe_experts:
            absent |= set(_DENSE)
        inner = [rest for rest in _INNER if rest not in absent]
        if model.num_moe_experts:
            own = [part.removeprefix("mlp.") for part in _DENSE]
            inner += [_ROUTER]
            inner += [f"mlp.experts.{e}.{x}" for e in range(model.num_moe_experts) for x in own]
        layers = [f"decoder.layers.{i}.{rest}" for i in range(model.num_layers) for rest in inner]
        head = ["output_layer.weight"] if model.untie_embeddings_and_output_weights else []
        head = [REWARD_HEAD] if model.kind == "reward" else head
        return [_VOCABULARY[0], *layers, "decoder.final_layernorm.weight", *head]

    def hf_names(self, name: str) -> tuple[str, ...]:
        """The Hugging Face tensors that a canonical parameter is made of, in order."""
        if name in _OUTER:
            return (_OUTER[name],)
        layer, rest = _layer_part(name)
        expert = _EXPERT.fullmatch(rest)
        if not expert and rest != _ROUTER:
            return tuple(f"model.layers.{layer}.{part}" for part in _INNER[rest])
        block, renamed = ("mlp", {}) if self.model.qk_layernorm else ("block_sparse_moe", _MIXTRAL)
        prefix, parts = f"model.layers.{layer}.{block}", ("mlp.gate.weight",)
        if expert:
            prefix, parts = f"{prefix}.experts.{expert[1]}", _INNER[f"mlp.{expert[2]}"]
        owners = [part.split(".")[1] for part in parts]
        return tuple(f"{prefix}.{renamed.get(owner, owner)}.weight" for owner in owners)

    def checkpoint_key(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Where a distributed checkpoint keeps a canonical parameter: its key, and which of how
        many along the leading axes it is.

        All layers lie in one tensor under Transformer Engine's name:
        `decoder.layers.2.input_layernorm.weight` is (2,) of (num_layers,) in
        `decoder.layers.self_attention.linear_qkv.layer_norm_weight`, and
        `decoder.layers.2.mlp.experts.5.linear_fc2.weight` is (2, 5) of (num_layers, experts) in
        `decoder.layers.mlp.experts.experts.linear_fc2.weight`.
        """
        if name in _OUTER:
            return name, (), ()
        layer, rest = _layer_part(name)
        layers, experts = self.model.num_layers, self.model.num_moe_experts
        if expert := _EXPERT.fullmatch(rest):
            key = f"decoder.layers.{_CHECKPOINT_EXPERT}{expert[2]}"
            return key, (layer, int(expert[1])), (layers, experts)
        if not (experts and rest == "pre_mlp_layernorm.weight"):  # fused only where it is dense
            rest = _CHECKPOINT_NAMES.get(rest, rest)
        return f"decoder.layers.{rest}", (layer,), (layers,)

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
        """A canonical parameter, or what tensor-parallel rank `rank` of `size` owns of it.

        The vocabulary is filled up with zero rows to `padded_vocab_size`; 0 leaves it as it is.
        """
        parts = self.hf_names(name)
        if name in _VOCABULARY:
            return self._read_vocabulary(parts[0], read, rank, size, padded_vocab_size)
        if name in _OUTER:
            return read(parts[0], ALL, ALL)
        _, rest = _layer_part(name)
        rest = _EXPERT.sub(r"mlp.\2", rest)
        if rest in _SPLIT_COLUMNS:
            return read(parts[0], ALL, self._share(self._hf_shape(parts[0])[1], rank, size))
        if rest not in (_QKV_WEIGHT, _QKV_BIAS, _FC1):
            return read(parts[0], ALL, ALL)
        rows = [self._share(self._hf_shape(part)[0], rank, size) for part in parts]
        found = [read(part, own, ALL) for part, own in zip(parts, rows, strict=True)]
        if rest == _FC1:
            return torch.cat(found)
        groups = self.model.num_query_groups // size
        grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in found]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """A whole canonical parameter as Hugging Face's tensors by name; the inverse of `read`."""
        parts = self.hf_names(name)
        if len(parts) == 1:
            return {parts[0]: parameter[: self._hf_shape(parts[0])[0]]}
        groups = 1 if name.endswith("linear_fc1.weight") else self.model.num_query_groups
        sizes = [self._hf_shape(part)[0] // groups for part in parts]
        grouped = parameter.reshape(groups, -1, *parameter.shape[1:])
        found = [x.flatten(0, 1) for x in grouped.split(sizes, dim=1)]
        return dict(zip(parts, found, strict=True))

    def _hf_shape(self, part: str) -> tuple[int, ...]:
        m = self.model
        query, key = m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
        hidden, ffn = m.hidden_size, m.ffn_hidden_size
        if ".experts." in part:
            ffn = m.moe_ffn_hidden_size or ffn
        owner, kind = part.split(".")[-2:]
        rows, columns = {
            "embed_tokens": (self.vocab_size, hidden),
            "lm_head": (self.vocab_size, hidden),
            "score": (1, hidden),
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
            "gate": (m.num_moe_experts, hidden),
            "q_norm": (m.kv_channels, None),
            "k_norm": (m.kv_channels, None),
        }.get(owner, (hidden, None))
        return (rows,) if kind == "bias" or columns is None else (rows, columns)

    def _read_vocabulary(
        self, part: str, read: Read, rank: int, size: int, padded_vocab_size: int
    ) -> Tensor:
        own = self._share(padded_vocab_size or self.vocab_size, rank, size)
        stop = min(own.stop, self.vocab_size)
        found = read(part, slice(min(own.start, stop), stop), ALL)
        missing = own.stop - own.start - len(found)
        if not missing:
            return found
        return torch.cat([found, found.new_zeros(missing, *found.shape[1:])])

    @staticmethod
    def _share(total: int, rank: int, size: int) -> slice:
        assert total % size == 0, f"{total} rows or columns over {size} tensor-parallel ranks"
        return slice(total // size * rank, total // size * (rank + 1))
