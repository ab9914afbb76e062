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
    from megatron_prefix.model.hf.peft import PeftAdapter
    from megatron_prefix.model.hf.weights import WeightMap
else:
    __getattr__ = lazy_face(
        __name__,
        config=["HFModel"],
        export=["write_hf_folder"],
        files=["HFTensors", "copy_companions", "write_safetensors"],
        peft=["PeftAdapter"],
        weights=["WeightMap"],
    )

__all__ = [
    "HFModel",
    "HFTensors",
    "PeftAdapter",
    "WeightMap",
    "copy_companions",
    "write_hf_folder",
    "write_safetensors",
]
