"""Checkpoints: save and load a run, import and export Hugging Face models, and start from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.checkpoint.adapter_state import SavedAdapter
    from megatron_prefix.checkpoint.convert import export_hf, import_hf
    from megatron_prefix.checkpoint.save_load import RunCheckpoints, resolve_checkpoint
    from megatron_prefix.checkpoint.starting_model import (
        StartingModel,
        hf_folder,
        resolve_starting_model,
    )
else:
    __getattr__ = lazy_face(
        __name__,
        adapter_state=["SavedAdapter"],
        convert=["export_hf", "import_hf"],
        save_load=["RunCheckpoints", "resolve_checkpoint"],
        starting_model=["StartingModel", "hf_folder", "resolve_starting_model"],
    )

__all__ = [
    "RunCheckpoints",
    "SavedAdapter",
    "StartingModel",
    "export_hf",
    "hf_folder",
    "import_hf",
    "resolve_checkpoint",
    "resolve_starting_model",
]
