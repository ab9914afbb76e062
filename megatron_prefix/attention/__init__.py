"""Attention over packed prefix trees: one definition of visibility, several backends.

`api.py` checks the arguments and calls a backend. `plan.py` turns a layout into the arrays that
backends read. `backends/dense.py` is the specification; the other backends compute the same
without a token-by-token mask. `megatron.py` connects them to Megatron-Core's layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.faces import lazy_face

if TYPE_CHECKING:
    from megatron_prefix.attention.api import tree_attention
    from megatron_prefix.attention.megatron import (
        TreeCoreAttention,
        TreePackedSeqParams,
        check_backend,
        prepare_attention,
    )
    from megatron_prefix.attention.plan import TreePlan
    from megatron_prefix.attention.rotary import Rotation, rotation_of
else:
    __getattr__ = lazy_face(
        __name__,
        api=["tree_attention"],
        megatron=["TreeCoreAttention", "TreePackedSeqParams", "check_backend", "prepare_attention"],
        plan=["TreePlan"],
        rotary=["Rotation", "rotation_of"],
    )

__all__ = [
    "Rotation",
    "TreeCoreAttention",
    "TreePackedSeqParams",
    "TreePlan",
    "check_backend",
    "prepare_attention",
    "rotation_of",
    "tree_attention",
]
