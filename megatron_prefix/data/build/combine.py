"""Reports of parts -> the report of the whole, whatever counts a report has.

{"dropped": {"no pair": 2}, "records": ["a:1"]} and {"dropped": {"no pair": 1}, "records": []}
together are {"dropped": {"no pair": 3}, "records": ["a:1"]}
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from megatron_prefix.data.build import report


def combine(total: Any, part: Any) -> Any:
    """`part` behind `total`, which may be changed: numbers add up, lists follow one another up
    to what a report lists, mappings and dataclasses combine entry by entry, texts are the last."""
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
    if isinstance(total, str | bool):
        return part
    return total + part
