"""Initial weights as a function of (seed, canonical parameter name) alone.

Megatron-Core draws weights in the order in which a rank builds its layers, from streams that
depend on the layout, and padding the vocabulary shifts every later draw. Here every parameter
is drawn whole and unpadded from its own stream and then cut to this rank's part, so that all
layouts start from the same model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_prefix.model.gpt import TreeGPTModel, TreeTransformerConfig
from megatron_prefix.model.hf.weights import canonical_name, is_expert


def canonical_parameters(model: TreeGPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with their names in the whole, unsharded model.

    On the second of two pipeline stages with 2 layers each, `decoder.layers.0.mlp.…` is
    canonically `decoder.layers.2.mlp.…`; norms that Transformer Engine fuses into the linear
    layer behind them have the names of Megatron-Core's local layers; an expert has its number
    among those of all ranks.
    """
    layers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    experts, group = model.config.num_moe_experts or 0, model.pg_collection.ep
    first_expert = experts // group.size() * group.rank()
    for name, parameter in model.named_parameters():
        offset = 0
        if name.startswith("decoder.layers."):
            index = int(name.split(".")[2])
            offset = layers[index] - index
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of the first's
        yield canonical_name(name, offset, first_expert), parameter


VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def tensor_group(name: str, model: TreeGPTModel) -> torch.distributed.ProcessGroup:
    """The ranks that share the matrix of a canonical parameter."""
    groups = model.pg_collection
    return groups.expt_tp if is_expert(name) else groups.tp


@torch.no_grad()
def whole_parameter(name: str, parameter: torch.nn.Parameter, model: TreeGPTModel) -> Tensor:
    """A canonical parameter gathered from all tensor-parallel ranks, its vocabulary unpadded;
    collective over them."""
    group, whole = tensor_group(name, model), parameter.detach()
    if group.size() > 1 and getattr(parameter, "tensor_model_parallel", False):
        dim = parameter.partition_dim
        parts = [torch.empty_like(whole) for _ in range(group.size())]
        torch.distributed.all_gather(parts, whole.contiguous(), group=group)
        if name.endswith("linear_fc1.weight") and model.config.gated_linear_unit:
            halves = zip(*(part.chunk(2, dim) for part in parts), strict=True)
            parts = [x for half in halves for x in half]
        whole = torch.cat(parts, dim)
    if name in VOCABULARY:
        whole = whole[: model.config.vocab_size]
    return whole.contiguous()


@torch.no_grad()
def initialize_weights(model: TreeGPTModel, seed: int, only: str | None = None) -> None:
    """Draw every parameter of this rank by name, or the one called `only`; see the module's
    docstring. A reward model's head is drawn like other matrices, from N(0, init_method_std), as
    Hugging Face draws it from N(0, initializer_range)."""
    for name, parameter in canonical_parameters(model):
        if only is not None and name != only:
            continue
        group = tensor_group(name, model)
        parameter.copy_(_initial(name, parameter, model.config, group, seed))


def _initial(name, parameter, config: TreeTransformerConfig, group, seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros_like(parameter)
    if parameter.dim() == 1:
        return torch.ones_like(parameter)
    shape, dim = list(parameter.shape), None
    if getattr(parameter, "tensor_model_parallel", False):
        dim = parameter.partition_dim
        shape[dim] *= group.size()
    is_vocabulary = name in VOCABULARY
    if is_vocabulary:
        shape[0] = config.vocab_size
    whole = _normal(name, shape, _standard_deviation(name, config), seed)
    if is_vocabulary:
        padding = whole.new_zeros(config.padded_vocab_size - config.vocab_size, shape[1])
        whole = torch.cat([whole, padding])
    if dim is None:
        return whole
    if name.endswith("linear_fc1.weight") and config.gated_linear_unit:
        gate, up = whole.chunk(2, dim)
        parts = [x.chunk(group.size(), dim)[group.rank()] for x in (gate, up)]
        return torch.cat(parts, dim)
    return whole.chunk(group.size(), dim)[group.rank()]


def _standard_deviation(name: str, config: TreeTransformerConfig) -> float:
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.init_method_std / math.sqrt(2 * config.num_layers)
    return config.init_method_std


def _normal(name: str, shape: list[int], std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"weights/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
