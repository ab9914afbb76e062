"""Checkpoints: save and load a run, import and export Hugging Face models, and start from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.checkpoint.convert import export_hf, import_hf
    from megatron_prefix.checkpoint.save_load import (
        RunCheckpoints,
        load_weights,
        resolve_checkpoint,
    )
    from megatron_prefix.checkpoint.starting_model import (
        StartingModel,
        hf_folder,
        resolve_starting_model,
    )
else:
    __getattr__ = lazy_face(
        __name__,
        convert=["export_hf", "import_hf"],
        save_load=["RunCheckpoints", "load_weights", "resolve_checkpoint"],
        starting_model=["StartingModel", "hf_folder", "resolve_starting_model"],
    )

__all__ = [
    "RunCheckpoints",
    "StartingModel",
    "export_hf",
    "hf_folder",
    "import_hf",
    "load_weights",
    "resolve_checkpoint",
    "resolve_starting_model",
]
