"""A model's parameters under their canonical names, and gathered from all tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_prefix.model.gpt import TreeGPTModel, unwrap
from megatron_prefix.model.names import (
    EMBEDDING,
    OUTPUT_LAYER,
    VOCABULARY,
    canonical_name,
    is_added,
    is_expert,
)


def canonical_parameters(model: TreeGPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters with their canonical names (see names.py).

    On the second of two pipeline stages with 2 layers each, `decoder.layers.0.mlp.…` is
    canonically `decoder.layers.2.mlp.…`; on the second of two ranks that share 8 experts, the
    rank's expert 1 is expert 5.
    """
    layers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    # 8 experts over 2 ranks: the second rank's first expert is 4.
    experts, group = model.config.num_moe_experts or 0, model.pg_collection.ep
    first_expert = experts // group.size() * group.rank()
    for name, parameter in model.named_parameters():
        offset = 0
        if name.startswith("decoder.layers."):
            index = int(name.split(".")[2])
            offset = layers[index] - index
        if name == OUTPUT_LAYER and model.share_embeddings_and_output_weights:
            name = EMBEDDING  # the last stage's copy of the first's
        yield canonical_name(name, offset, first_expert), parameter


def base_parameters(model: TreeGPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """`canonical_parameters` without adapters and what else `lora` adds."""
    return ((name, x) for name, x in canonical_parameters(model) if not is_added(name))


def partition_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that tensor parallelism divides; None if every rank holds the whole."""
    is_divided = getattr(parameter, "tensor_model_parallel", False)
    return getattr(parameter, "partition_dim", None) if is_divided else None


def tensor_group(name: str, model: TreeGPTModel) -> torch.distributed.ProcessGroup:
    """The ranks that share the matrix of a canonical parameter."""
    groups = model.pg_collection
    return groups.expt_tp if is_expert(name) else groups.tp


@torch.no_grad()
def whole_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Canonical names and whole tensors of a model chunk, one at a time, the vocabulary unpadded;
    collective over tensor-parallel ranks."""
    model = unwrap(chunk)
    for name, parameter in canonical_parameters(model):
        yield name, _whole(name, parameter, model)


def _whole(name: str, parameter: torch.nn.Parameter, model: TreeGPTModel) -> Tensor:
    group, whole, dim = tensor_group(name, model), parameter.detach(), partition_dim(parameter)
    if group.size() > 1 and dim is not None:
        parts = [torch.empty_like(whole) for _ in range(group.size())]
        torch.distributed.all_gather(parts, whole.contiguous(), group=group)
        is_fused = ".linear_fc1." in name and not is_added(name)  # adapters are apart
        if is_fused and model.config.gated_linear_unit:
            # ranks hold [g0 u0] and [g1 u1], the whole is [g0 g1 u0 u1]
            halves = zip(*(part.chunk(2, dim) for part in parts), strict=True)
            parts = [x for half in halves for x in half]
        whole = torch.cat(parts, dim)
    if name in VOCABULARY:
        whole = whole[: model.config.vocab_size]
    return whole.contiguous()
