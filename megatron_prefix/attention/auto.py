"""Choice of the backend `auto`: the first entry of auto_table.json that fits.

An entry names a device type, a device, dtypes, a range of head dims, a range of gather factors
(gathered keys over keys, see plan.py), and a backend: the fastest in a measurement, or one given
by a rule. `dense` is never among them, because its memory is quadratic. Entries are tried in
order. An entry is skipped if its backend cannot run on this machine.
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

    An entry with a condition on head dim or gather factor does not fit if that is not known.
    """
    # A condition that is null fits everything. With "dtypes" ["bfloat16"] and "head_dim"
    # [null, 129] an entry fits bfloat16 with head dims up to 128; it does not fit if the head dim
    # is unknown.
    facts = {
        "device_type": device.type,
        "device": _device_name(device) if any(entry["device"] for entry in entries) else None,
        "dtypes": str(dtype).removeprefix("torch."),
    }
    ranges = {"head_dim": head_dim, "gather_factor": gather_factor}
    return [
        entry["backend"]
        for entry in entries
        if all(entry[key] is None or _is_one(entry[key], value) for key, value in facts.items())
        and all(entry[key] is None or _is_in(entry[key], value) for key, value in ranges.items())
    ]


def gather_factors(entries: tuple[dict, ...]) -> list[float]:
    """Gather factors of which each row's has the same candidates as one of them."""
    # [null, 2.0], [2.0, 4.0] and null -> 0.0, 2.0, 4.0: between two bounds nothing changes
    bounds = [bound for entry in entries for bound in entry["gather_factor"] or ()]
    return sorted({0.0, *(bound for bound in bounds if bound is not None)})


@functools.lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str | None:
    """torch's name of a CUDA device; None for CPUs, which the table does not tell apart."""
    is_available = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if is_available else None


def _is_one(allowed: str | list[str], value: str | None) -> bool:
    return value == allowed if isinstance(allowed, str) else value in allowed


def _is_in(bounds: list[float | None], value: float | None) -> bool:
    low, high = bounds
    return value is not None and (low is None or value >= low) and (high is None or value < high)
