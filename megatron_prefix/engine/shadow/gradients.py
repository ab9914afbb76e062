"""Gradients on the host: this rank's share of a step's summed gradients, beside those of a second
run.

Megatron-Core keeps gradients in buffers that are cut into buckets. After the sum over data-parallel
ranks, every rank has all of a bucket; with the distributed optimizer only its own part of it, and
the rest is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_prefix.model import unwrap
from megatron_prefix.model.parameters import canonical_parameters

PIECE = 2**22
"""Entries compared at a time."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much the gradients of one parameter differ, on this rank's share of it."""

    name: str
    """Canonical name."""
    norm: float
    """Of the difference."""
    norms: tuple[float, float]
    """Of both gradients, the one on the host first."""


@dataclass(frozen=True, eq=False)
class HostGradients:
    """Copies on the host, one for each bucket."""

    shares: list[Tensor]

    @classmethod
    def copied(cls, chunks: list[DistributedDataParallel]) -> HostGradients:
        """This rank's share of the gradients of `chunks`."""
        return cls([share.cpu().clone() for _, share, _ in _shares(chunks)])

    def restore(self, chunks: list[DistributedDataParallel]) -> None:
        """Put them back; what this rank does not own stays as it is."""
        for own, (_, share, _) in zip(self.shares, _shares(chunks), strict=True):
            share.copy_(own)

    def differences(self, chunks: list[DistributedDataParallel]) -> Iterator[Difference]:
        """Every parameter of this rank against its gradient in `chunks`."""
        for own, (names, share, places) in zip(self.shares, _shares(chunks), strict=True):
            for name, place in zip(names, places, strict=True):
                squares = torch.zeros(3, dtype=torch.float64, device=share.device)
                # in pieces, so that the device never holds a second copy of a large parameter
                pieces = zip(own[place].split(PIECE), share[place].split(PIECE), strict=True)
                for first, second in pieces:
                    a, b = first.to(share.device).double(), second.double()
                    squares += torch.stack(
                        [(a - b).square().sum(), a.square().sum(), (b * b).sum()]
                    )
                norm, *norms = squares.sqrt().tolist()
                yield Difference(name=name, norm=norm, norms=(norms[0], norms[1]))


def _shares(
    chunks: list[DistributedDataParallel],
) -> Iterator[tuple[list[str], Tensor, list[slice]]]:
    """This rank's share of every bucket, and which of its entries belong to which parameter."""
    for chunk in chunks:
        names = {parameter: name for name, parameter in canonical_parameters(unwrap(chunk))}
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            is_divided = chunk.ddp_config.use_distributed_optimizer
            size, rank = (group.size(), group.rank()) if is_divided else (1, 0)
            for number, bucket in enumerate(buffer.buckets):
                # A bucket of entries 100 to 180 of its buffer, the second of two ranks: its share
                # is [140, 180). A parameter at [130, 150) has the places [0, 10) of this share.
                length = bucket.grad_data.numel() // size
                first = bucket.offset + rank * length
                places: dict[str, slice] = {}
                for parameter, (start, end, own_bucket) in buffer.param_index_map.items():
                    low, high = max(start, first), min(end, first + length)
                    if own_bucket == number and low < high:
                        places[names[parameter]] = slice(low - first, high - first)
                share = bucket.grad_data[rank * length : (rank + 1) * length]
                yield [*places], share, [*places.values()]
