"""Replacements for layers of Megatron-Core: norm, gate, rotary angles, router."""

from megatron_prefix.model.layers.moe import step_auxiliary, with_tree_router
from megatron_prefix.model.layers.norm import SEQUENCE_PARALLEL, RMSNorm
from megatron_prefix.model.layers.rope import rotary_angles
from megatron_prefix.model.layers.swiglu import SwiGLU

__all__ = [
    "SEQUENCE_PARALLEL",
    "RMSNorm",
    "SwiGLU",
    "rotary_angles",
    "step_auxiliary",
    "with_tree_router",
]
