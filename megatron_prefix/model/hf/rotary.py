"""Rotary embedding as a configuration of transformers has it -> sizes of the model.

`rope_parameters` are one set for all layers, or one for each kind of layer (Gemma 3, OLMo 3).
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from megatron_prefix.config import RopeScaling
from megatron_prefix.errors import InputError
from megatron_prefix.model.hf.family import Family
from megatron_prefix.model.hf.values import count, natural, number
from megatron_prefix.text import counted

FULL, SLIDING = "full_attention", "sliding_attention"
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LENGTH = "original_max_position_embeddings"
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "dynamic": _COMMON | {"factor"},
    "llama3": _COMMON | {"factor", "low_freq_factor", "high_freq_factor", _LENGTH},
    "yarn": _COMMON
    | {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    | {"truncate", _LENGTH},
    "longrope": _COMMON | {"factor", "attention_factor", "short_factor", "long_factor", _LENGTH},
}
"""Keys of `rope_parameters` by rotary scaling."""
GROWTH = "llama_4_scaling_beta"
SECTIONS, _SECTIONS = "mrope_section", (16, 24, 24)
"""Of M-RoPE, and transformers' default."""
_GROWTH_KEYS = frozenset({GROWTH, _LENGTH, "max_position_embeddings"})
"""Keys of families with `query_growth`; the last has no effect."""


def read_rotary(
    settings: Any, family: Family, head_dim: int, num_layers: int, source: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `ModelSizes`, and of `Architecture`. Raises InputError, naming the key."""
    rope = settings.rope_parameters
    if not isinstance(rope, dict):
        raise InputError(f"{source}: rotary scaling {rope!r} is not an object")
    parts: dict[str, Any] = {}
    types = getattr(settings, "layer_types", None) or []
    if family.rotary in ("by layer type", "sliding layers"):
        check_layer_types(types, num_layers, source)
    if family.rotary == "by layer type":
        by_type = {
            kind: _one(rope.get(kind), settings, family, source, is_nested=True)
            for kind in set(types)
        }
        base, scaling = by_type.get(FULL) or by_type[SLIDING]
        local = by_type.get(SLIDING, (base, scaling))
        if local != (base, scaling):
            parts["local_rotary_base"], parts["local_rope_scaling"] = local
            parts["rotary"] = tuple("local" if kind == SLIDING else "global" for kind in types)
        factors = {rope[kind].get("partial_rotary_factor") for kind in set(types)}
    else:
        base, scaling = _one(rope, settings, family, source)
        factors = {rope.get("partial_rotary_factor")}
    if family.rotary == "no_rope_layers":
        parts["rotary"] = _rotary_layers(settings.no_rope_layers, num_layers, source)
    if family.rotary == "sliding layers":
        parts["rotary"] = tuple("global" if kind == SLIDING else "none" for kind in types)
    channels = _channels(factors, family, head_dim, source)
    if channels != head_dim:
        parts["rotary_channels"] = channels
    if family.rotary_sections:
        parts["rotary_sections"] = _sections(rope.get(SECTIONS), channels, source)
    if family.query_growth and rope.get(GROWTH) != 0:
        parts["query_growth"] = number(rope.get(GROWTH), GROWTH, source)
        parts["query_growth_length"] = natural(rope.get(_LENGTH), _LENGTH, source)
    return {"rotary_base": base, "rope_scaling": scaling}, parts


def _sections(given: Any, channels: int, source: str) -> tuple[int, ...]:
    """Pairs of channels that rotate by time, height and width, in turns."""
    sections = list(_SECTIONS) if given is None else given
    if not isinstance(sections, list) or not all(type(x) is int and x > 0 for x in sections):
        raise InputError(f"{source}: {SECTIONS} is {sections!r}, expected a list of numbers")
    if sum(sections) != channels // 2:
        raise InputError(
            f"{source}: {SECTIONS} = {sections} has {counted(sum(sections), 'pair')} of channels, "
            f"and a head has {channels // 2}: correct rope_parameters"
        )
    return tuple(sections)


def check_layer_types(types: Any, num_layers: int, source: str) -> None:
    """Refuse layers that are neither full nor sliding."""
    if len(types) != num_layers or not set(types) <= {FULL, SLIDING}:
        raise InputError(
            f"{source}: layer_types {types!r} must name full_attention or sliding_attention for "
            f"each of {num_layers} layers"
        )


def _rotary_layers(values: Any, num_layers: int, source: str) -> tuple[str, ...]:
    """SmolLM3's list of 1 for layers with rotation and 0 for layers without."""
    if not isinstance(values, list) or len(values) < num_layers or not set(values) <= {0, 1}:
        raise InputError(
            f"{source}: no_rope_layers is {values!r}, expected 1 (rotated) or 0 for each of "
            f"{num_layers} layers"
        )
    kinds = tuple("global" if value else "none" for value in values[:num_layers])
    return kinds if "none" in kinds else ()


def _channels(factors: set[Any], family: Family, head_dim: int, source: str) -> int:
    """Channels of a head that are rotated."""
    factors = {1 if factor is None else factor for factor in factors}
    if factors == {1}:
        return head_dim
    [factor] = factors if len(factors) == 1 else [factors]
    if not family.partial_rotary:
        raise InputError(
            f"{source}: partial_rotary_factor = {factor!r} is not supported: all channels of a "
            "head of this model type are rotated"
        )
    channels = int(head_dim * number(factor, "partial_rotary_factor", source))
    if not 2 <= channels <= head_dim or channels % 2:
        raise InputError(
            f"{source}: partial_rotary_factor = {factor!r} rotates {channels} of {head_dim} "
            "channels of a head: it must be an even number of them"
        )
    return channels


def _one(
    rope: Any, settings: Any, family: Family, source: str, is_nested: bool = False
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of one set of `rope_parameters`."""
    if not isinstance(rope, dict):
        raise InputError(f"{source}: rope_parameters {rope!r} is not an object")
    kind = rope.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        *others, last = ROPE_KEYS
        raise InputError(
            f"{source}: rotary scaling {kind!r} is not supported; {', '.join(others)} and {last} "
            "are"
        )
    known = ROPE_KEYS[kind] | (_GROWTH_KEYS if family.query_growth else frozenset())
    known |= {SECTIONS} if family.rotary_sections else frozenset()
    for key, value in rope.items():
        if key not in known and value is not None:
            raise InputError(
                f"{source}: rope_parameters.{key} = {value!r} is no setting of rotary scaling "
                f"{kind!r}: remove it, or choose another rope_type"
            )
    base = number(rope.get("rope_theta"), "rope_theta", source)
    if kind == "default":
        return base, None
    scaling = _scaling(kind, rope, settings, is_nested, source)
    try:
        result = RopeScaling(type=kind, **scaling)  # type: ignore[arg-type]
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in fault["loc"])
        raise InputError(
            f"{source}: rope_parameters.{name} = {str(fault['input'])[:100]}: {fault['msg']}"
        ) from None
    if faults := list(result.faults("rope_parameters")):
        raise InputError(f"{source}: {faults[0]}")
    return base, result


def _scaling(
    kind: str, rope: dict[str, Any], settings: Any, is_nested: bool, source: str
) -> dict[str, Any]:
    """Settings of a scaling with transformers' defaults filled in."""
    scaling: dict[str, Any] = {}
    length = rope.get(_LENGTH)
    if kind == "dynamic":
        length = settings.max_position_embeddings
    if kind != "linear":
        scaling[_LENGTH] = natural(length, _LENGTH, source)
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = count(settings, "max_position_embeddings", source) / scaling[_LENGTH]
    scaling["factor"] = number(factor, "factor", source)
    for name in ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ():
        scaling[name] = number(rope.get(name), name, source)
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = rope.get(name)
        if not isinstance(values, list):
            raise InputError(f"{source}: {name} is {values!r}, expected a list of numbers")
        scaling[name] = tuple(number(value, name, source) for value in values)
    for name in ("beta_fast", "beta_slow") if kind == "yarn" else ():
        if rope.get(name):  # 0 counts as absent
            scaling[name] = number(rope[name], name, source)
    if kind == "yarn" and rope.get("truncate") is False and not is_nested:
        scaling["truncate"] = False  # transformers looks for it only there
    if kind in ("yarn", "longrope") and rope.get("attention_factor") is not None:
        scaling["attention_factor"] = number(rope["attention_factor"], "attention_factor", source)
    elif kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
        # DeepSeek's: the ratio of two amplitudes, 0.1 m log(factor) + 1
        first, second = (
            0.1 * number(rope[name], name, source) * math.log(scaling["factor"]) + 1
            if scaling["factor"] > 1
            else 1.0
            for name in ("mscale", "mscale_all_dim")
        )
        scaling["attention_factor"] = first / second
    return scaling
