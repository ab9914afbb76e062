"""Replacements for layers of Megatron-Core: whole layers, attention, norms, gate, rotary angles,
router."""

from megatron_prefix.model.layers.block import FamilyLayer, norm_class
from megatron_prefix.model.layers.latent import with_latent_attention
from megatron_prefix.model.layers.moe import step_auxiliary, with_tree_router
from megatron_prefix.model.layers.norm import SEQUENCE_PARALLEL
from megatron_prefix.model.layers.rope import rotary_angles
from megatron_prefix.model.layers.swiglu import SwiGLU

__all__ = [
    "SEQUENCE_PARALLEL",
    "FamilyLayer",
    "SwiGLU",
    "norm_class",
    "rotary_angles",
    "step_auxiliary",
    "with_latent_attention",
    "with_tree_router",
]
