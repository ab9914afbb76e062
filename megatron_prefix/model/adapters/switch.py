"""The reference model of a run with adapters: the model itself, with its adapters off or as they
were at the start. No weight is stored twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.model.adapters.trained import is_trained

SWITCH = "has_adapters_on"
"""Attribute of the modules that add adapters, or use a trained copy of a matrix."""


@contextlib.contextmanager
def without_adapters(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within the context, the model chunks compute what the frozen base computes."""
    owners = [m for chunk in chunks for m in chunk.modules() if hasattr(m, SWITCH)]
    for owner in owners:
        setattr(owner, SWITCH, False)
    try:
        yield
    finally:
        for owner in owners:
            setattr(owner, SWITCH, True)


def as_reference(
    chunks: Sequence[torch.nn.Module], lora: LoraConfig | None
) -> contextlib.AbstractContextManager[None]:
    """Within the context, model chunks that hold the policy of the start compute what its reference
    computes; without `lora`, and with `lora.reference: start`, this is the policy itself."""
    if lora is None or lora.reference == "start":
        return contextlib.nullcontext()
    return without_adapters(chunks)


@dataclass(frozen=True, eq=False)
class StartWeights:
    """The trained parameters of model chunks, each with its value at the start."""

    values: list[tuple[torch.nn.Parameter, torch.Tensor]]

    @classmethod
    def of(cls, models: Sequence[torch.nn.Module]) -> StartWeights:
        """The values that they have now; `models` without wrappers."""
        named = [pair for model in models for pair in model.named_parameters()]
        return cls([(p, p.detach().clone()) for name, p in named if is_trained(name)])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context, the model computes with the values of the start. No gradients."""
        current = [parameter.data for parameter, _ in self.values]
        for parameter, start in self.values:
            parameter.data = start
        try:
            yield
        finally:
            for (parameter, _), data in zip(self.values, current, strict=True):
                parameter.data = data
