"""Hugging Face's tensors <-> Megatron-Core's parameters, one tensor at a time.

Megatron-Core fuses tensors that are separate in Hugging Face. With query heads q, key heads k and
value heads v in two groups, and gate g and up-projection u:

    linear_qkv   q0 q1 k0 v0 | q2 q3 k1 v1        one group after another
    linear_fc1   g | u

The experts of a mixture are separate in both. Some families have one tensor of several parts, as
Phi-3's qkv_proj (q, then k, then v) and gate_up_proj: each part is a `Piece` of it. names.py has
the names by family.

Every slice that a tensor-parallel rank owns is a slice of each piece, so a rank reads its own
rows and columns only. Names are canonical (model/names.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.config import ModelSizes
from megatron_prefix.model.hf.config import HFModel
from megatron_prefix.model.hf.files import HFTensors
from megatron_prefix.model.hf.images import ImageFamily
from megatron_prefix.model.hf.modules import NOT_OF_A_MODULE, parameters_of_layer, shape_of
from megatron_prefix.model.hf.names import (
    EXPERT_FC1,
    EXPERT_FC2,
    FC1,
    FC2,
    INPUT_NORM,
    K_NORM,
    KV_NORM,
    KV_UP,
    LLAMA,
    PRE_MLP_NORM,
    PROJ,
    Q_NORM,
    Q_PROJ,
    Q_UP,
    QKV,
    SHARED_FC1,
    SHARED_FC2,
    Names,
)
from megatron_prefix.model.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    REWARD_HEAD,
    SINKS,
    TRANSFORMER_ENGINE_NAMES,
    VISION,
    VOCABULARY,
    layer_and_part,
)

Read = Callable[[str, slice, slice], Tensor]
"""`read(name, rows, columns)`: that part of a Hugging Face tensor; a vector has only rows."""

ALL = slice(None)
_CHECKPOINT_NAMES = {local: fused for fused, local in TRANSFORMER_ENGINE_NAMES.items()}
_FINAL_NORM = "decoder.final_layernorm"
_OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    f"{_FINAL_NORM}.weight": "model.norm.weight",
    f"{_FINAL_NORM}.bias": "model.norm.bias",
    OUTPUT_LAYER: "lm_head.weight",
    REWARD_HEAD: REWARD_HEAD,
}
"""Parameters outside of the layers, and their names in Hugging Face."""
_SPLIT_COLUMNS = (PROJ, FC2, EXPERT_FC2, SHARED_FC2)
_SPLIT_ROWS = (QKV, Q_PROJ, Q_UP, KV_UP, FC1, EXPERT_FC1, SHARED_FC1, SINKS)
_FUSED_LATENT = {
    f"{Q_NORM}.weight": f"{Q_UP}.layer_norm_weight",
    f"{KV_NORM}.weight": f"{KV_UP}.layer_norm_weight",
}
"""Norms of multi-latent attention, and their names in checkpoints."""
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
_CHECKPOINT_EXPERT = "mlp.experts.experts."


@dataclass(frozen=True)
class Piece:
    """Rows of a Hugging Face tensor that are one part of a parameter.

    If a tensor has all experts, `expert` is the one that is meant. Its matrices are transposed, and
    its parts take turns: of gate and up, rows 0, 2, 4 … are the gate's, so `start` 0 and `step` 2.
    """

    tensor: str
    start: int
    rows: int
    columns: int
    """0 for a vector."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    step: int = 1
    expert: int | None = None

    def of_expert(self, tensor: Tensor) -> Tensor:
        """Its rows of the whole tensor, [rows, columns] or [rows]; of a view, also a view."""
        whole = tensor[self.expert]
        whole = whole.T if self.columns else whole
        return whole[self.start :: self.step]


@dataclass(frozen=True)
class WeightMap:
    """The parameters of one model; `vocab_size` is unpadded, `kind` is `lm` or `reward`, and
    `num_labels` are the scores of a reward model."""

    sizes: ModelSizes
    vocab_size: int
    kind: str = "lm"
    num_labels: int = 1
    tensor_names: Names = field(default_factory=lambda: LLAMA)
    """Hugging Face's names; those of the family."""
    images: ImageFamily | None = None
    """Of a model that reads images."""
    image_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The parameters of the part that reads them, by the names that it has itself."""

    @classmethod
    def of(
        cls,
        model: HFModel,
        *,
        sizes: ModelSizes | None = None,
        kind: str | None = None,
        num_labels: int | None = None,
    ) -> WeightMap:
        """The weights of a directory; a reward model that is made of it has other `sizes`, `kind`
        and `num_labels`. Raises InputError."""
        return cls(
            sizes or model.sizes,
            model.vocab_size,
            kind or model.kind,
            num_labels or model.num_labels,
            model.family.names,
            model.images,
            model.image_shapes,
        )

    def tensors(self, directory: Path) -> HFTensors:
        """The files of a directory, which have these tensors or others. Raises InputError."""
        rename = None if self.images is None else self.images.own_name
        return HFTensors(directory, rename=rename)

    def file_name(self, tensor: str) -> str:
        """The name of a Hugging Face tensor in files that are written."""
        return tensor if self.images is None else self.images.file_name(tensor)

    def names(self) -> list[str]:
        """Canonical names of all parameters, from the embedding to the head."""
        sizes = self.sizes
        layers = [
            f"decoder.layers.{layer}.{part}"
            for layer in range(sizes.num_layers)
            for part in parameters_of_layer(sizes, layer)
        ]
        final = [f"{_FINAL_NORM}.weight"]
        final += [f"{_FINAL_NORM}.bias"] if sizes.architecture.norm_bias else []
        head = [OUTPUT_LAYER] if sizes.untie_embeddings_and_output_weights else []
        head = [REWARD_HEAD] if self.kind == "reward" else head
        image_part = [f"{VISION}{name}" for name in self.image_shapes]
        return [*image_part, EMBEDDING, *layers, *final, *head]

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The parts of Hugging Face tensors that a canonical parameter is made of, in order."""
        if name in _OUTER:
            rows = {EMBEDDING: self.vocab_size, OUTPUT_LAYER: self.vocab_size}
            rows[REWARD_HEAD] = self.num_labels
            hidden = self.sizes.hidden_size
            shape = (rows[name], hidden) if name in rows else (hidden,)
            return (Piece(_OUTER[name], 0, shape[0], hidden if name in rows else 0, shape),)
        layer, part = layer_and_part(name)
        module, kind, expert = _module(part)
        rows_of_parts, columns = shape_of(self.sizes, module)
        columns = columns if kind == "weight" else 0
        if expert and "{expert}" not in self.tensor_names[module][0]:
            return self._pieces_of_expert(layer, module, kind, int(expert))
        tensors = [
            f"model.layers.{layer}.{theirs.format(expert=expert)}.{kind}".rstrip(".")
            for theirs in self.tensor_names[module]
        ]
        # Phi-3's queries, keys and values, 8, 4 and 4 rows: 0 to 8, 8 to 12 and 12 to 16 of one
        starts, total = [0] * len(rows_of_parts), sum(rows_of_parts)
        is_joined = len(tensors) < len(rows_of_parts)
        if is_joined:
            starts = [sum(rows_of_parts[:i]) for i in range(len(rows_of_parts))]
            tensors *= len(rows_of_parts)
        rest = (columns,) if columns else ()
        return tuple(
            Piece(tensor, start, rows, columns, (total if is_joined else rows, *rest))
            for tensor, start, rows in zip(tensors, starts, rows_of_parts, strict=True)
        )

    def _pieces_of_expert(
        self, layer: int, module: str, kind: str, expert: int
    ) -> tuple[Piece, ...]:
        """Pieces of tensors that have all experts: [experts, columns, rows], or [experts, rows]."""
        rows_of_parts, columns = shape_of(self.sizes, module)
        suffix = "" if kind == "weight" else "_bias"
        tensor = f"model.layers.{layer}.{self.tensor_names[module][0]}{suffix}"
        step, total = len(rows_of_parts), sum(rows_of_parts)
        inner = (total,) if suffix else (columns, total)
        return tuple(
            Piece(
                tensor,
                start,
                rows,
                0 if suffix else columns,
                (self.sizes.num_moe_experts, *inner),
                step,
                expert,
            )
            for start, rows in enumerate(rows_of_parts)
        )

    def hf_names(self, name: str) -> tuple[str, ...]:
        """The Hugging Face tensors that a canonical parameter is made of, in order."""
        if name.startswith(VISION):
            return (name.removeprefix(VISION),)
        return tuple(dict.fromkeys(piece.tensor for piece in self.pieces(name)))

    def checkpoint_key(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The place of a canonical parameter in a distributed checkpoint: its key, its index along
        the leading axes, and their lengths.

        All layers are in one tensor under Transformer Engine's name:
        `decoder.layers.2.input_layernorm.weight` is (2,) of (num_layers,) in
        `decoder.layers.self_attention.linear_qkv.layer_norm_weight`, and
        `decoder.layers.2.mlp.experts.5.linear_fc2.weight` is (2, 5) of (num_layers, experts) in
        `decoder.layers.mlp.experts.experts.linear_fc2.weight`. If only some layers have experts,
        each layer has its tensors: `decoder.layers.2.mlp.experts.experts.linear_fc2.weight`.
        """
        if name in _OUTER or name.startswith(VISION):
            return name, (), ()
        layer, part = layer_and_part(name)
        # layers of two kinds are not in one tensor
        has_two_kinds = self.sizes.architecture.dense_layers > 0
        prefix = f"decoder.layers.{layer}." if has_two_kinds else "decoder.layers."
        index, length = ((), ()) if has_two_kinds else ((layer,), (self.sizes.num_layers,))
        if expert := _EXPERT.fullmatch(part):
            key = f"{prefix}{_CHECKPOINT_EXPERT}{expert[2]}"
            return key, (*index, int(expert[1])), (*length, self.sizes.num_moe_experts)
        return f"{prefix}{self._checkpoint_part(layer, part)}", index, length

    def _checkpoint_part(self, layer: int, part: str) -> str:
        """Transformer Engine's name of a part of a layer, which fuses some norms."""
        if self.sizes.has_experts(layer) and part.startswith(PRE_MLP_NORM):
            return part
        if self.sizes.architecture.latent is None:
            return _CHECKPOINT_NAMES.get(part, part)
        if part.startswith(INPUT_NORM):
            return part
        return _FUSED_LATENT.get(part) or _CHECKPOINT_NAMES.get(part, part)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole canonical parameter, its vocabulary unpadded."""
        if name.startswith(VISION):
            return self.image_shapes[name.removeprefix(VISION)]
        pieces = self.pieces(name)
        rows, columns = sum(piece.rows for piece in pieces), pieces[0].columns
        return (rows, columns) if columns else (rows,)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all Hugging Face tensors of the model, by name."""
        text = [name for name in self.names() if not name.startswith(VISION)]
        return {
            **self.image_shapes,
            **{x.tensor: x.shape for name in text for x in self.pieces(name)},
        }

    def read(
        self, name: str, read: Read, rank: int = 0, size: int = 1, padded_vocab_size: int = 0
    ) -> Tensor:
        """A canonical parameter, or the part of it that tensor-parallel rank `rank` of `size` owns.

        The vocabulary is filled up with zeros to `padded_vocab_size` tokens; 0 leaves it as it is.
        """
        if name.startswith(VISION):
            return read(name.removeprefix(VISION), ALL, ALL)
        pieces = self.pieces(name)
        if name in VOCABULARY:
            return self._read_vocabulary(pieces[0].tensor, read, rank, size, padded_vocab_size)
        module, kind = name, ""
        if name not in _OUTER:
            module, kind, _ = _module(layer_and_part(name)[1])
        columns = ALL
        if module in _SPLIT_COLUMNS and kind == "weight":
            columns = self._share(pieces[0].columns, rank, size)
        has_norm_by_rank = self.sizes.architecture.qk_norm != "none"
        is_divided_norm = module in (Q_NORM, K_NORM) and has_norm_by_rank
        tensors = []
        for piece in pieces:
            own = slice(0, piece.rows)
            if module in _SPLIT_ROWS or is_divided_norm:
                own = self._share(piece.rows, rank, size)
            if piece.expert is not None:
                one = slice(piece.expert, piece.expert + 1)
                whole = read(piece.tensor, one, columns if piece.columns else ALL)
                tensors.append(replace(piece, expert=0).of_expert(whole)[own])
                continue
            rows = slice(piece.start + own.start, piece.start + own.stop)
            tensors.append(read(piece.tensor, rows, columns))
        if module != QKV:
            return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        # q [q0 q1 q2 q3], k [k0 k1], v [v0 v1] -> [[q0 q1 k0 v0], [q2 q3 k1 v1]] -> one axis
        groups = self.sizes.num_query_groups // size
        grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def has_all_experts(self, name: str) -> bool:
        """Whether a canonical parameter is in a tensor that has all experts."""
        return not name.startswith(VISION) and self.pieces(name)[0].expert is not None

    def groups(self) -> list[list[str]]:
        """Canonical names that give whole tensors together, in the order of `hf_shapes`: one
        parameter, or, if a tensor has all experts, theirs."""
        groups: dict[str, list[str]] = {}
        for name in self.names():
            is_joined = self.has_all_experts(name)
            groups.setdefault(self.hf_names(name)[0] if is_joined else name, []).append(name)
        return list(groups.values())

    def join_experts(self, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensor that has all experts, from a group of whole canonical parameters."""
        tensor, joined = "", torch.empty(0)
        for name, parameter in parameters:
            pieces = self.pieces(name)
            if not tensor:
                tensor, joined = pieces[0].tensor, parameter.new_empty(pieces[0].shape)
            lengths = [piece.rows for piece in pieces]
            for piece, part in zip(pieces, parameter.split(lengths), strict=True):
                piece.of_expert(joined).copy_(part)
        return {tensor: joined}

    def split(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """A whole canonical parameter as Hugging Face's tensors by name; the inverse of `read`."""
        if name.startswith(VISION):
            return {name.removeprefix(VISION): parameter}
        pieces = self.pieces(name)
        assert pieces[0].expert is None, "join_experts writes the tensor of all experts"
        if len(pieces) == 1:
            return {pieces[0].tensor: parameter[: pieces[0].rows]}
        # 4 query heads and 2 groups of one channel: rows [q0 q1 k0 v0 | q2 q3 k1 v1] are cut in
        # each group after 2, 1 and 1 rows, which gives q [q0 q1 q2 q3], k [k0 k1], v [v0 v1].
        groups = self.sizes.num_query_groups if f".{QKV}." in name else 1
        lengths = [piece.rows // groups for piece in pieces]
        grouped = parameter.reshape(groups, -1, *parameter.shape[1:])
        tensors: dict[str, list[Tensor]] = {}
        for piece, part in zip(pieces, grouped.split(lengths, dim=1), strict=True):
            tensors.setdefault(piece.tensor, []).append(part.flatten(0, 1))
        return {tensor: torch.cat(x) if len(x) > 1 else x[0] for tensor, x in tensors.items()}

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


def _module(part: str) -> tuple[str, str, str]:
    """`mlp.experts.5.linear_fc1.weight` -> ("mlp.experts.linear_fc1", "weight", "5"); the last is
    empty outside of experts."""
    if part in NOT_OF_A_MODULE:
        return part, NOT_OF_A_MODULE[part], ""
    module, _, kind = part.rpartition(".")
    if expert := _EXPERT.fullmatch(module):
        return f"mlp.experts.{expert[2]}", kind, expert[1]
    return module, kind, ""
