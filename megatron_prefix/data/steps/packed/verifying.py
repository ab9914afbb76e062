"""Checks of packed steps beyond structure.py: bytes, how often groups occur, and that rows fit.

Checks of lengths need the data set too.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.data.steps.packed.reading import PackedSteps, settings_of
from megatron_prefix.data.steps.packed.structure import (
    CHUNK,
    REMEDY,
    check_steps,
    not_a_packing,
    step_spans,
)
from megatron_prefix.data.steps.packed.writing import BundleLengths, Tally
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted


def verify_packed_steps(packed: PackedSteps, dataset: PreferenceDataset | None = None) -> None:
    """Check the checksums and the layout; with the data set, also that every row fits.

    It takes the memory of some steps and a number per group; with the data set, a number per
    bundle. Raises InputError with the file or the step.
    """
    packed.verify()
    check_steps(packed.path, packed.manifest, packed.columns)
    _verify_groups(packed)
    if dataset is not None:
        packed.check(dataset, settings_of(packed.manifest), None)
        check_rows(packed, dataset)


def _verify_groups(packed: PackedSteps) -> None:
    """Check that every group of the data set is there once per epoch, or as often as the weights or
    epochs of several data sets say."""
    groups, num_groups = packed.columns["groups"], packed.manifest["data"]["groups"]
    seen = np.zeros(num_groups, np.int32)
    for start in range(0, len(groups), CHUNK):
        chunk = groups[start : start + CHUNK]
        seen += np.bincount(chunk, minlength=num_groups)
    expected = _expected_counts(packed)
    for group in np.flatnonzero(seen != expected)[:1].tolist():
        if "sets" in packed.manifest["data"]:
            rule = f"instead of {expected[group]}"
        else:
            rule = f"in {counted(packed.manifest['settings']['epochs'], 'epoch')}"
        raise InputError(
            f"{packed.path}: group {group} occurs {counted(seen[group], 'time')} {rule}: {REMEDY}"
        )


def _expected_counts(packed: PackedSteps) -> np.ndarray:
    """How often each group occurs in the plan."""
    settings, data = settings_of(packed.manifest), packed.manifest["data"]
    sizes = tuple(part["groups"] for part in data.get("sets", [data]))
    return settings.group_counts(sizes, data["fingerprint"], packed.manifest["counts"]["steps"])


def check_rows(packed: PackedSteps, dataset: PreferenceDataset) -> None:
    """Check that every step packs the bundles of its groups into rows that hold them, and the fill
    in the manifest. `dataset` must be the one that was packed. Raises InputError."""
    settings, columns = settings_of(packed.manifest), packed.columns
    capacity = packed.manifest["settings"]["row_capacity"]
    lengths = BundleLengths(dataset, settings.sharing, capacity, settings.oversized)
    tally = Tally(capacity)
    for first, starts in step_spans(columns):
        last = first + len(starts) - 1
        step_groups, step_rows = (
            columns[f"step_{n}"][first : last + 1] for n in ("groups", "rows")
        )
        groups = np.asarray(columns["groups"][step_groups[0] : step_groups[-1]])
        num_bundles = np.add.reduceat(lengths.num_of(groups), step_groups[:-1] - step_groups[0])
        for step in np.flatnonzero(num_bundles != np.diff(starts))[:1].tolist():
            raise not_a_packing(packed.path, first + step)
        items = np.asarray(columns["items"][starts[0] : starts[-1]], np.int64)
        items += np.repeat(starts[:-1] - starts[0], num_bundles)
        row_items = columns["row_items"][step_rows[0] : step_rows[-1]] - starts[0]
        rows = np.add.reduceat(lengths.of(groups)[items], row_items)
        for row in np.flatnonzero(rows > capacity)[:1].tolist():
            step = first + int(np.searchsorted(step_rows, step_rows[0] + row, "right")) - 1
            raise InputError(
                f"{packed.path}: step {step} has a row of {counted(rows[row], 'token')}, and its "
                f"rows hold {capacity}: {REMEDY}"
            )
        tally.add_rows(rows, np.asarray(step_rows[:-1] - step_rows[0]))
    for name, value in tally.summary().items():
        if packed.manifest.get(name) != value:
            raise InputError(
                f"{packed.path}/plan.json: {name} is {packed.manifest.get(name)}, and {value} for "
                f"the rows: {REMEDY}"
            )
