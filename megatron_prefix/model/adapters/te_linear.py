"""Transformer Engine's parallel linear layers with adapters; imported only if it is installed.

The adapters need the normed input of the layer. So layers that have one are not those that compute
the norm inside.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

from megatron_prefix.model.adapters.linear import OfDown, OfGateUp, OfOutput, OfQKV


class TEQKVLinear(OfQKV, TEColumnParallelLinear):
    """Queries, keys and values."""


class TEOutputLinear(OfOutput, TERowParallelLinear):
    """The projection after attention."""


class TEGateUpLinear(OfGateUp, TEColumnParallelLinear):
    """Gate and up-projection of a feed-forward layer or an expert."""


class TEDownLinear(OfDown, TERowParallelLinear):
    """The projection back."""
