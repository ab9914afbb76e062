"""Adapters in PEFT's form, which keeps them apart as they are here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.model.hf.peft.directory import PeftAdapter, peft_config, peft_name
    from megatron_prefix.model.hf.peft.parameters import AdapterMap
    from megatron_prefix.model.hf.reading import ADAPTER, ADAPTER_WEIGHTS
else:
    __getattr__ = lazy_face(
        __name__,
        directory=["ADAPTER", "ADAPTER_WEIGHTS", "PeftAdapter", "peft_config", "peft_name"],
        parameters=["AdapterMap"],
    )

__all__ = [
    "ADAPTER",
    "ADAPTER_WEIGHTS",
    "AdapterMap",
    "PeftAdapter",
    "peft_config",
    "peft_name",
]
