"""What `auto` stands for: the first fitting entry of auto_table.json, beside this file.

An entry names a device type, a device, dtypes, a range of head dims and a range of gather factors
(gathered keys over keys, see plan.py), and the backend that was fastest there or that a rule
gives; `dense`, whose memory is quadratic, is never among them. Entries are tried in order; one
whose backend cannot run here is passed over.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("auto_table.json")
FIELDS = ("device_type", "device", "dtypes", "head_dim", "gather_factor", "backend", "measured")


@functools.cache
def read_table() -> tuple[dict, ...]:
    """The entries of auto_table.json, in order."""
    return tuple(json.loads(TABLE.read_text(encoding="utf-8"))["entries"])


def candidates(
    entries: tuple[dict, ...],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    gather_factor: float | None,
) -> list[str]:
    """Backends of the entries that fit, best first.

    An entry that asks for a head dim or a gather factor does not fit where it is not known.
    """
    facts = {
        "device_type": device.type,
        "device": _name(device) if any(entry["device"] for entry in entries) else None,
        "dtypes": str(dtype).removeprefix("torch."),
    }
    ranges = {"head_dim": head_dim, "gather_factor": gather_factor}
    return [
        entry["backend"]
        for entry in entries
        if all(entry[key] is None or _is_one(entry[key], value) for key, value in facts.items())
        and all(entry[key] is None or _is_in(entry[key], value) for key, value in ranges.items())
    ]


@functools.lru_cache(maxsize=16)
def _name(device: torch.device) -> str | None:
    """What torch calls the device; CPUs have no name, as they are too many."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if is_there else None


def _is_one(allowed: str | list[str], value: str | None) -> bool:
    return value == allowed if isinstance(allowed, str) else value in allowed


def _is_in(bounds: list[float | None], value: float | None) -> bool:
    low, high = bounds
    return value is not None and (low is None or value >= low) and (high is None or value < high)
