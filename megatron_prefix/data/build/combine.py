"""Reports of parts -> the report of the whole.

{"dropped": {"no pair": 2}, "records": ["a:1"]} and {"dropped": {"no pair": 1}, "records": []}
give {"dropped": {"no pair": 3}, "records": ["a:1"]}
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from megatron_prefix.data.build import report


def combine(total: Any, part: Any) -> Any:
    """`total` with `part` added; `total` may be changed.

    Numbers add up. Lists are concatenated, up to MAX_LISTED entries. Mappings and dataclasses are
    combined entry by entry. Of two texts the last is kept.
    """
    if is_dataclass(total):
        for field in fields(total):
            name = field.name
            setattr(total, name, combine(getattr(total, name), getattr(part, name)))
        return total
    if isinstance(total, dict):
        for key, value in part.items():
            total[key] = combine(total[key], value) if key in total else value
        return total
    if isinstance(total, list):
        return (total + part)[: report.MAX_LISTED]
    # A bool is an int for Python, so it is handled before numbers are added.
    if isinstance(total, str | bool):
        return part
    return total + part
