"""Multi-latent attention and routing by groups as a configuration of transformers has them.

The values of DeepSeek-V2 and V3 -> sizes and parts of the model. Raises InputError, naming the key.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_prefix.config.parts import LatentAttention, Routing
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.family import Family
from megatron_prefix.model.hf.values import count, number, switch

NORM_EPSILON = 1e-6
"""Of the norms of what is compressed, whatever rms_norm_eps is."""
_GREEDY, _BY_GROUPS = "greedy", "group_limited_greedy"


def read_latent(settings: Any, source: str) -> LatentAttention:
    """Sizes of multi-latent attention."""
    sizes = LatentAttention(
        query_rank=None if settings.q_lora_rank is None else count(settings, "q_lora_rank", source),
        key_value_rank=count(settings, "kv_lora_rank", source),
        unrotated_channels=count(settings, "qk_nope_head_dim", source),
        rotated_channels=count(settings, "qk_rope_head_dim", source),
        value_channels=count(settings, "v_head_dim", source),
        down_bias=switch(settings, "attention_bias", source),
        norm_epsilon=NORM_EPSILON,
    )
    if sizes.rotated_channels % 2 or sizes.query_channels % 2:
        raise InputError(
            f"{source}: qk_rope_head_dim = {sizes.rotated_channels} and qk_nope_head_dim = "
            f"{sizes.unrotated_channels} must be even: pairs of channels are rotated"
        )
    if settings.head_dim != sizes.rotated_channels:
        raise InputError(
            f"{source}: head_dim is {settings.head_dim!r}, and qk_rope_head_dim = "
            f"{sizes.rotated_channels} channels of a head are rotated: remove head_dim"
        )
    heads, groups = settings.num_attention_heads, settings.num_key_value_heads
    if heads != groups:
        raise InputError(
            f"{source}: num_key_value_heads = {groups} and num_attention_heads = {heads}: with "
            "multi-latent attention every head has its own keys and values; make them equal"
        )
    return sizes


def score_scale(settings: Any, latent: LatentAttention, source: str) -> float | None:
    """Factor of attention's scores, if it is not 1 / sqrt(channels): YaRN with `mscale_all_dim` m
    multiplies it by (0.1 m log(factor) + 1) squared."""
    rope = settings.rope_parameters
    if rope["rope_type"] == "default" or not rope.get("mscale_all_dim"):
        return None
    growth, factor = (number(rope.get(x), x, source) for x in ("mscale_all_dim", "factor"))
    if factor <= 1:
        return None
    return (0.1 * growth * math.log(factor) + 1) ** 2 / math.sqrt(latent.query_channels)


def read_routing(settings: Any, family: Family, source: str) -> Routing:
    """How tokens choose experts."""
    is_sigmoid = family.routing == "sigmoid"
    groups = chosen = 1
    method = getattr(settings, "topk_method", None)
    if is_sigmoid or method == _BY_GROUPS:
        groups, chosen = (count(settings, key, source) for key in ("n_group", "topk_group"))
    elif method != _GREEDY:
        raise InputError(
            f"{source}: topk_method = {method!r} is not supported: {_GREEDY} and {_BY_GROUPS} are"
        )
    return Routing(
        score="sigmoid" if is_sigmoid else "softmax",
        groups=groups,
        chosen_groups=chosen,
        normalised=is_sigmoid and switch(settings, "norm_topk_prob", source),
        factor=number(settings.routed_scaling_factor, "routed_scaling_factor", source),
    )


def dense_layers(settings: Any, num_layers: int, source: str) -> int:
    """First layers without experts."""
    if (kinds := getattr(settings, "mlp_layer_types", None)) is not None:
        dense = kinds.count("dense") if isinstance(kinds, list) else 0
        if kinds != ["dense"] * dense + ["sparse"] * (num_layers - dense):
            raise InputError(
                f"{source}: mlp_layer_types is {kinds!r}: it must name each of {num_layers} layers "
                "dense or sparse, and dense layers come first"
            )
        return dense
    key = "first_k_dense_replace"
    value = getattr(settings, key, None)
    if type(value) is not int or value < 0:
        raise InputError(f"{source}: {key} is {value!r}, expected a number of layers, 0 or more")
    return min(value, num_layers)
