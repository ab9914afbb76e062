"""Rules for values that were read from JSON: each returns whether a value obeys it.

    is_plan = an_object({"steps": is_count, "name": is_text}, {"fill": is_number})
    is_plan({"steps": 3, "name": "a"})      # True
    is_plan({"steps": 3.0, "name": "a"})    # False: not an integer

A forged or damaged file may have anything in any place, and a small file can name a large size. So
numbers have bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], bool]

MAX_COUNT = 1 << 48
"""Of everything that is counted, so that sums and products of sizes stay far below 2**63."""


def is_count(value: Any) -> bool:
    """An integer of 0 to MAX_COUNT; true and 1.0 are none."""
    return type(value) is int and 0 <= value <= MAX_COUNT


def is_size(value: Any) -> bool:
    """An integer of 1 to MAX_COUNT."""
    return is_count(value) and value > 0


def is_number(value: Any) -> bool:
    """A number of 0 to MAX_COUNT."""
    return type(value) in (int, float) and 0 <= value <= MAX_COUNT


def is_text(value: Any) -> bool:
    """A text that can be written as UTF-8."""
    return isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value)


def is_pair(value: Any) -> bool:
    """A list of two integers."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


def one_of(*values: Any) -> Rule:
    """One of these values, of the same type."""
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def or_null(rule: Rule) -> Rule:
    """null, or what obeys `rule`."""
    return lambda value: value is None or rule(value)


def a_list_of(rule: Rule) -> Rule:
    """A list, perhaps empty, whose entries obey `rule`."""
    return lambda value: isinstance(value, list) and all(map(rule, value))


def a_map_of(rule: Rule) -> Rule:
    """An object of any keys whose values obey `rule`."""
    return lambda value: (
        isinstance(value, dict) and all(map(is_text, value)) and all(map(rule, value.values()))
    )


def an_object(needed: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """An object with all `needed` keys, perhaps some of the `optional` ones, and no others."""
    known = {**needed, **(optional or {})}
    return lambda value: (
        isinstance(value, dict)
        and needed.keys() <= value.keys() <= known.keys()
        and all(known[name](inner) for name, inner in value.items())
    )
