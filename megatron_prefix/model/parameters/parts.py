"""What this rank holds of the trained parameters of a model with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_prefix.model.adapters import is_trained
from megatron_prefix.model.gpt import TreeGPTModel
from megatron_prefix.model.names import VOCABULARY, is_expert
from megatron_prefix.model.parameters.canonical import (
    canonical_parameters,
    partition_dim,
    tensor_group,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnPart:
    """A rank's part of one parameter."""

    name: str
    """In this rank's model."""
    canonical: str
    parameter: torch.nn.Parameter
    axis: int | None
    """What tensor parallelism divides; None if every rank has the whole parameter."""
    rank: int
    ranks: int
    """The tensor-parallel ranks of the parameter, and this one among them."""
    vocab_size: int
    """Of the model, unpadded."""
    data_rank: int
    """This rank among those that have the same part."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter, its vocabulary unpadded."""
        shape = list(self.parameter.shape)
        if self.axis is not None:
            shape[self.axis] *= self.ranks
        if self.is_vocabulary:
            shape[0] = self.vocab_size
        return tuple(shape)

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are tokens, of which the last may be padding."""
        return self.canonical in VOCABULARY


def trained_parts(model: TreeGPTModel) -> Iterator[OwnPart]:
    """The parts of all trained parameters of a model with adapters."""
    groups = model.pg_collection
    for (name, _), (canonical, parameter) in zip(
        model.named_parameters(), canonical_parameters(model), strict=True
    ):
        if not is_trained(name):
            continue
        group = tensor_group(canonical, model)
        data = groups.expt_dp if is_expert(canonical) else groups.dp_cp
        yield OwnPart(
            name=name,
            canonical=canonical,
            parameter=parameter,
            axis=partition_dim(parameter),
            rank=group.rank(),
            ranks=group.size(),
            vocab_size=model.config.vocab_size,
            data_rank=data.rank(),
        )
