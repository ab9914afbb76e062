"""The adapter that a run starts from: a PEFT directory, or a checkpoint of a run with adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from megatron_prefix.checkpoint import torch_dist
from megatron_prefix.checkpoint.adapter_state import SavedAdapter, lora_settings
from megatron_prefix.checkpoint.save_load import load_trained, resolve_checkpoint
from megatron_prefix.config import ModelSizes
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.errors import InputError
from megatron_prefix.model import unwrap
from megatron_prefix.model.hf.peft import PeftAdapter
from megatron_prefix.model.parameters import trained_parts


class StartingAdapter(Protocol):
    """An adapter that exists."""

    @property
    def lora(self) -> LoraConfig:
        """Its settings."""

    @property
    def note(self) -> str | None:
        """A message for the user, if there is any."""

    def load(self, chunks: list[torch.nn.Module], adapter: SavedAdapter) -> None:
        """Load it into models whose adapters are described by `adapter`. Raises InputError."""


@dataclass(frozen=True)
class CheckpointAdapter:
    """Adapters of a checkpoint, which knows its base."""

    path: Path
    saved: SavedAdapter

    @property
    def lora(self) -> LoraConfig:
        return self.saved.lora()

    @property
    def note(self) -> str | None:
        return None

    def load(self, chunks: list[torch.nn.Module], adapter: SavedAdapter) -> None:
        load_trained(self.path, chunks, adapter)


@dataclass(frozen=True)
class PeftDirectory:
    """Adapters in PEFT's form. Which weights they belong to is not known, only which shapes."""

    source: PeftAdapter

    @property
    def lora(self) -> LoraConfig:
        return self.source.lora

    @property
    def note(self) -> str | None:
        if not self.source.dropout:
            return None
        return (
            f"lora.adapter = {self.source.directory} was trained with lora_dropout = "
            f"{self.source.dropout}; this run trains it without"
        )

    @torch.no_grad()
    def load(self, chunks: list[torch.nn.Module], adapter: SavedAdapter) -> None:
        parts = [part for chunk in chunks for part in trained_parts(unwrap(chunk))]
        shapes = [{part.canonical: part.whole_shape for part in parts}]
        if torch.distributed.is_initialized():  # each pipeline stage knows its own
            shapes *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shapes, shapes[0])
        self.source.check({name: shape for own in shapes for name, shape in own.items()})
        for part in parts:
            size = 0 if part.axis is None else part.parameter.size(part.axis)
            tensor = self.source.part(part.canonical, part.axis, part.rank, part.ranks, size)
            if tensor is None:
                continue
            if part.is_vocabulary:  # its last rows are padding
                part.parameter.zero_()
            part.parameter[: len(tensor)] = tensor.to(part.parameter)


def open_adapter(path: str) -> StartingAdapter:
    """The adapter of `lora.adapter`. Raises InputError."""
    directory = Path(path)
    if (directory / "adapter_config.json").is_file():
        return PeftDirectory(PeftAdapter.read(directory))
    try:
        folder = resolve_checkpoint(directory)
    except InputError:
        raise InputError(
            f"lora.adapter = {path}: neither a PEFT directory, with adapter_config.json, nor a "
            "checkpoint; give one of them"
        ) from None
    saved = None
    if not torch_dist.is_foreign(folder):
        saved = SavedAdapter.read(torch_dist.load_common(folder), folder)
    if saved is None:
        raise InputError(
            f"lora.adapter = {path}: the checkpoint has no adapters, but all weights of a model: "
            "start from it with model.checkpoint"
        )
    return CheckpointAdapter(folder, saved)


def with_settings_of(adapter: LoraConfig, section: LoraConfig, sizes: ModelSizes) -> LoraConfig:
    """The lora section with the settings of the adapter that it names, of a model of `sizes`. What
    is given in both must agree. Raises InputError."""
    of_model = sizes.num_moe_experts > 0, sizes.num_layers
    adapter, meant = adapter.resolved(*of_model), lora_settings(section.resolved(*of_model))
    own = lora_settings(adapter)
    differing = ", ".join(
        f"lora.{key} = {meant[key]!r}, and the adapter has {own[key]!r}"
        for key in own
        if getattr(section, key) is not None and meant[key] != own[key]
    )
    if differing:
        raise InputError(
            f"lora.adapter = {section.adapter}: {differing}: leave them out, the adapter has them"
        )
    return replace(section, **{key: getattr(adapter, key) for key in own})
