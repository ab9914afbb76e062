"""Checkpoints: save and load a run, import and export Hugging Face models, and start from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.checkpoint.convert import export_checkpoint, import_checkpoint
    from megatron_prefix.checkpoint.save_load import (
        RunCheckpoints,
        load_weights,
        resolve_checkpoint,
    )
    from megatron_prefix.checkpoint.starting_model import (
        InitialModel,
        hf_folder,
        initial_model,
    )
else:
    __getattr__ = lazy_face(
        __name__,
        convert=["export_checkpoint", "import_checkpoint"],
        save_load=["RunCheckpoints", "load_weights", "resolve_checkpoint"],
        starting_model=["InitialModel", "hf_folder", "initial_model"],
    )

__all__ = [
    "InitialModel",
    "RunCheckpoints",
    "hf_folder",
    "export_checkpoint",
    "import_checkpoint",
    "initial_model",
    "load_weights",
    "resolve_checkpoint",
]
