"""Hugging Face models: `config.json`, safetensors, and the names of their tensors.

`HFModel` needs no torch, so the face is lazy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.model.hf.config import HFModel
    from megatron_prefix.model.hf.export import write_hf_folder
    from megatron_prefix.model.hf.files import HFTensors, copy_companions, write_safetensors
    from megatron_prefix.model.hf.reading import refuse_adapter
    from megatron_prefix.model.hf.weights import Read, WeightMap
else:
    __getattr__ = lazy_face(
        __name__,
        config=["HFModel"],
        export=["write_hf_folder"],
        files=["HFTensors", "copy_companions", "write_safetensors"],
        reading=["refuse_adapter"],
        weights=["Read", "WeightMap"],
    )

__all__ = [
    "HFModel",
    "HFTensors",
    "Read",
    "WeightMap",
    "copy_companions",
    "refuse_adapter",
    "write_hf_folder",
    "write_safetensors",
]
