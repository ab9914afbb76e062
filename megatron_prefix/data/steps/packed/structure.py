"""Checks of packed steps when they are opened: the manifest's keys, and whole columns.

Two steps of three groups and one, in rows of one, two and one bundles:

    groups [4 0 2 1]     step_groups [0 3 4]
    items  [0 1 2 0]     row_items [0 1 3 4]     step_rows [0 2 3]

The steps begin at the items row_items[step_rows] = [0 3 4]. Items count from their step's first, so
[0 1 2 | 0] + [0 0 0 | 3] is every number below 4 once: each step packs each of its bundles once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.files import is_partition
from megatron_prefix.data.json_values import (
    Rule,
    a_list_of,
    a_map_of,
    an_object,
    is_count,
    is_number,
    is_size,
    is_text,
    one_of,
    or_null,
)
from megatron_prefix.data.steps.packing import PACKING_METHODS
from megatron_prefix.data.steps.sharing import SHARING_MODES
from megatron_prefix.errors import InputError

REMEDY = "pack again with megatron-prefix pack"
COLUMNS: dict[str, np.dtype] = {
    "groups": np.dtype("<i8"),
    "step_groups": np.dtype("<i8"),
    "items": np.dtype("<i4"),
    "row_items": np.dtype("<i8"),
    "step_rows": np.dtype("<i8"),
}
CHUNK = 1 << 20
"""Entries that are checked at a time."""


def _is_time(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


PART: dict[str, Rule] = {
    "fingerprint": is_text,
    "groups": lambda value: is_size(value) and value < 1 << 31,
}
SEEN: dict[str, Rule] = {"seen": a_map_of(a_list_of(_is_time))}
SETTINGS = an_object(
    {
        "seed": is_count,
        "sharing": one_of(*SHARING_MODES),
        "row_capacity": is_size,
        "global_batch_size": or_null(is_size),
        "rows_per_step": or_null(is_size),
        "sort_by_length": one_of(True, False),
        "packing_method": one_of(*PACKING_METHODS),
        "epochs": or_null(is_size),
    },
    {
        "oversized": one_of("error", "split"),
        "weights": a_list_of(is_number),
        "set_epochs": a_list_of(is_number),
    },
)
KEYS: dict[str, Rule] = {
    "format": is_text,
    "version": is_count,
    "data": an_object(PART, {**SEEN, "sets": a_list_of(an_object(PART, SEEN))}),
    "settings": SETTINGS,
    "counts": an_object(
        dict.fromkeys(("steps", "rows", "groups", "items"), is_size) | {"whole_steps": is_count}
    ),
    "tokens": is_count,
    "fill": is_number,
    "row_max_over_mean": is_number,
    "files": an_object(
        {f"{name}.npy": an_object({"bytes": is_count, "sha256": is_text}) for name in COLUMNS}
    ),
    "sha256": is_text,
}
OPTIONAL_KEYS: dict[str, Rule] = {"repeated_tokens": is_count}
"""With `oversized: split` only."""


def check_keys(manifest: Mapping[str, Any], file: Path) -> None:
    """Refuse a manifest with a key that is missing, unknown, or not what `pack` writes."""
    for name in [name for name in KEYS if name not in manifest]:
        raise InputError(f"{file} lacks '{name}': {REMEDY}")
    known = {**KEYS, **OPTIONAL_KEYS}
    for name, value in manifest.items():
        if name not in known:
            raise InputError(f"{file} has the unknown key {name!r}: {REMEDY}")
        if not known[name](value):
            raise InputError(f"{file} is damaged: '{name}' is not what pack writes: {REMEDY}")
    settings, counts, data = manifest["settings"], manifest["counts"], manifest["data"]
    if (settings["global_batch_size"] is None) == (settings["rows_per_step"] is None):
        raise InputError(f"{file} is damaged: its steps have no size, or two: {REMEDY}")
    if ("repeated_tokens" in manifest) != (settings.get("oversized") == "split"):
        raise InputError(f"{file} is damaged: repeated tokens go with oversized: split: {REMEDY}")
    if counts["whole_steps"] > counts["steps"]:
        raise InputError(f"{file} is damaged: more whole steps than steps: {REMEDY}")
    sizes = [part["groups"] for part in data.get("sets", [data])]
    shares = [settings[name] for name in ("weights", "set_epochs") if name in settings]
    if sum(sizes) != data["groups"] or any(len(share) != len(sizes) for share in shares):
        raise InputError(f"{file} is damaged: its data sets do not add up: {REMEDY}")
    if not shares and counts["groups"] != data["groups"] * (settings["epochs"] or 0):
        raise InputError(f"{file} is damaged: it has other groups than its epochs: {REMEDY}")


def check_steps(path: Path, manifest: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
    """Check that offsets ascend, that groups exist, and that every step packs each of its bundles
    once. Raises InputError with the file or the step."""
    counts, num_groups = manifest["counts"], manifest["data"]["groups"]
    for name, total in (("step_groups", "groups"), ("row_items", "items"), ("step_rows", "rows")):
        if not is_partition(columns[name], counts[total], 1):
            raise InputError(f"{path}/{name}.npy: offsets do not ascend: {REMEDY}")
    groups = columns["groups"]
    for start in range(0, len(groups), CHUNK):
        chunk = groups[start : start + CHUNK]
        if chunk.min() < 0 or chunk.max() >= num_groups:
            raise InputError(f"{path}/groups.npy names a group outside the data set: {REMEDY}")
    for first, starts in step_spans(columns):
        sizes = np.diff(starts)
        items = np.asarray(columns["items"][starts[0] : starts[-1]], np.int64)
        step = np.repeat(np.arange(len(sizes)), sizes)
        wrong = (items < 0) | (items >= sizes[step])
        if not wrong.any():
            seen = np.zeros(len(items), bool)
            seen[items + (starts[:-1] - starts[0])[step]] = True
            wrong = ~seen
        for at in np.flatnonzero(wrong)[:1]:
            raise not_a_packing(path, first + int(step[at]))


def step_spans(columns: Mapping[str, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """(first step, where its items and those of the following steps begin, and where the last one's
    end), about CHUNK items at a time, at least one step."""
    rows, row_items = columns["step_rows"], columns["row_items"]
    starts, first = np.asarray(row_items)[np.asarray(rows)], 0
    while first < len(starts) - 1:
        reach = int(np.searchsorted(starts, int(starts[first]) + CHUNK, "right")) - 1
        last = max(reach, first + 1)
        yield first, starts[first : last + 1]
        first = last


def not_a_packing(path: Path, step: int) -> InputError:
    """Of a step that lacks a bundle, or has one twice."""
    return InputError(f"{path}: step {step} is not a packing of its groups: {REMEDY}")
