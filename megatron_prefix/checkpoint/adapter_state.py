"""Checkpoints of a run with adapters: what is trained, and which base model it belongs to.

The base is not saved again. Its fingerprint and its path are, so that it cannot be mistaken for
another one. Every tensor has its canonical name as key, so adapters fit every layout.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from pydantic import ValidationError

from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.errors import InputError
from megatron_prefix.model import unwrap
from megatron_prefix.model.parameters import trained_parts

KEY = "lora"
"""Of what a checkpoint has beside its tensors: a `SavedAdapter` as a dictionary."""
_SETTINGS = (
    *("r", "lora_alpha", "target_modules", "use_rslora", "layers_to_transform"),
    "modules_to_save",
)
"""Settings that decide which tensors there are, and what is computed with them."""


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """What a checkpoint says about its adapters: their settings, and their base model."""

    settings: dict[str, Any]
    base_fingerprint: str
    base: dict[str, str]
    """`model.hf` or `model.checkpoint` of the run, with an absolute path; empty for a base that was
    drawn."""

    @classmethod
    def of(cls, lora: LoraConfig, base_fingerprint: str, base: dict[str, str]) -> SavedAdapter:
        return cls(settings=lora_settings(lora), base_fingerprint=base_fingerprint, base=dict(base))

    @classmethod
    def read(cls, common: dict, path: Path) -> SavedAdapter | None:
        """Of a checkpoint's `common`; None if it has all weights of a model. Raises InputError."""
        saved = common.get(KEY)
        if saved is None:
            return None
        try:
            adapter = cls(**saved)
            adapter.lora()
            texts = [adapter.base_fingerprint, *chain(*adapter.base.items())]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("the base model is not described by texts")
        except (ValidationError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path}: its description of adapters is damaged ({text}); load another checkpoint"
            ) from None
        return adapter

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lora(self) -> LoraConfig:
        """The settings as a lora section."""
        return LoraConfig(**self.settings)

    @property
    def base_text(self) -> str:
        """The base model, for messages."""
        where = ", ".join(f"model.{key}: {value}" for key, value in self.base.items())
        return where or "drawn weights"


def lora_settings(lora: LoraConfig) -> dict[str, Any]:
    """What two adapters must have in common to hold the same tensors with the same meaning."""
    values = {key: getattr(lora, key) for key in _SETTINGS}
    return {k: sorted(v) if isinstance(v, tuple) else v for k, v in values.items()}


def check_adapter(path: Path, saved: SavedAdapter | None, ours: SavedAdapter | None) -> None:
    """Refuse a checkpoint of another base, of other adapters, or one that has adapters if this
    run has none, and the reverse. Raises InputError."""
    if saved is None and ours is None:
        return
    if saved is None:
        raise InputError(
            f"{path}: has all weights of a model, and this run trains adapters: start from it with "
            "model.checkpoint, or remove the lora section"
        )
    if ours is None:
        raise InputError(
            f"{path}: has only adapters, whose base is {saved.base_text}: give this base in the "
            "model section, and the lora section that they were trained with, or start from them "
            f"with lora.adapter: {path}"
        )
    if saved.base_fingerprint != ours.base_fingerprint:
        raise InputError(
            f"{path}: its adapters belong to another base model (fingerprint "
            f"{saved.base_fingerprint[:16]}…, {saved.base_text}) than this run has "
            f"({ours.base_fingerprint[:16]}…, {ours.base_text}): give that model, in the same dtype"
        )
    differing = ", ".join(
        f"lora.{key}: {saved.settings.get(key)!r} in the checkpoint, {value!r} now"
        for key, value in ours.settings.items()
        if saved.settings.get(key) != value
    )
    if differing:
        raise InputError(
            f"{path}: has other adapters ({differing}): give the lora section that they were "
            "trained with"
        )


def refuse_as_base(path: Path, saved: SavedAdapter | None) -> None:
    """Refuse to take a checkpoint that has only adapters for a model. Raises InputError."""
    if saved is not None:
        base = ", ".join(f"model.{key}: {value}" for key, value in saved.base.items())
        raise InputError(
            f"{path}: has only adapters of a model, not the model itself: give its base "
            f"({base or 'the sizes and train.seed of the run that drew it'}) in the model section, "
            f"and lora.adapter: {path}"
        )


def adapter_state(chunk: torch.nn.Module) -> dict[str, ShardedTensor]:
    """Sharded tensors of what is trained, by the names of this rank's parameters."""
    return {
        part.name: ShardedTensor.from_rank_offsets(
            part.canonical,
            part.parameter,
            *([] if part.axis is None else [(part.axis, part.rank, part.ranks)]),
            # an undivided parameter has a replica on every tensor-parallel rank
            replica_id=(0, part.rank if part.axis is None else 0, part.data_rank),
            allow_shape_mismatch=part.is_vocabulary,
        )
        for part in trained_parts(unwrap(chunk))
    }
