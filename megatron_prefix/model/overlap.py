"""parallel.tp_comm_overlap: Megatron-Core's settings for it, and whether layers have it here."""

from __future__ import annotations

from typing import Any

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.parts import Architecture
from megatron_prefix.errors import InputError
from megatron_prefix.model.spec import has_transformer_engine, uses_transformer_engine


def overlap_settings(parallel: ParallelConfig, parts: Architecture) -> dict[str, Any]:
    """Those of `TransformerConfig`, which leave the parts of the overlap at their defaults; none
    without `tp_comm_overlap`. Raises InputError if the layers are not Transformer Engine's."""
    if not parallel.tp_comm_overlap:
        return {}
    if not has_transformer_engine():
        raise InputError(
            "parallel.tp_comm_overlap = True needs CUDA and Transformer Engine's layers: install "
            "'transformer-engine[pytorch]', or remove it"
        )
    if not uses_transformer_engine(parts):
        raise InputError(
            "parallel.tp_comm_overlap = True: this model has parts that Transformer Engine's "
            "layers do not have: remove it"
        )
    return {"tp_comm_overlap": True}
