"""Checks of packed steps: bytes, offsets, that every step packs its groups, and that rows fit.

Steps are read one after another. Checks of lengths need the data set too.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.data.files import is_partition
from megatron_prefix.data.steps.packed.reading import REMEDY, PackedSteps, settings_of
from megatron_prefix.data.steps.packed.writing import BundleLengths, Tally
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError

CHUNK = 1 << 20


def verify_packed_steps(packed: PackedSteps, dataset: PreferenceDataset | None = None) -> None:
    """Check the checksums and the layout; with the data set, also that every row fits.

    It takes the memory of one step and a number per group; with the data set, a number per bundle.
    Raises InputError with the file or the step.
    """
    packed.verify()
    counts = packed.manifest["counts"]
    for name, total in (("step_groups", "groups"), ("row_items", "items"), ("step_rows", "rows")):
        if not is_partition(packed.column(name), counts[total], 1):
            raise InputError(f"{packed.path}/{name}.npy: offsets do not ascend: {REMEDY}")
    _verify_groups(packed)
    if dataset is None:
        for step in range(counts["steps"]):
            packed.packing(step)
        return
    settings = settings_of(packed.manifest)
    packed.check(dataset, settings, None)
    capacity = packed.manifest["settings"]["row_capacity"]
    lengths = BundleLengths(dataset, settings.sharing, capacity, settings.oversized)
    _verify_rows(packed, lengths, capacity)


def _verify_groups(packed: PackedSteps) -> None:
    """Check that every group of the data set is there once per epoch, or as often as the weights or
    epochs of several data sets say."""
    groups, num_groups = packed.column("groups"), packed.manifest["data"]["groups"]
    seen = np.zeros(num_groups, np.int32)
    for start in range(0, len(groups), CHUNK):
        chunk = groups[start : start + CHUNK]
        if chunk.min() < 0 or chunk.max() >= num_groups:
            raise InputError(
                f"{packed.path}/groups.npy names a group outside the data set: {REMEDY}"
            )
        seen += np.bincount(chunk, minlength=num_groups)
    expected = _expected_counts(packed)
    for group in np.flatnonzero(seen != expected)[:1].tolist():
        rule = f"in {packed.manifest['settings']['epochs']} epochs"
        if "sets" in packed.manifest["data"]:
            rule = f"instead of {expected[group]}"
        raise InputError(
            f"{packed.path}: group {group} occurs {seen[group]} times {rule}: {REMEDY}"
        )


def _expected_counts(packed: PackedSteps) -> np.ndarray:
    """How often each group occurs in the plan."""
    settings, data = settings_of(packed.manifest), packed.manifest["data"]
    sizes = tuple(part["groups"] for part in data.get("sets", [data]))
    return settings.group_counts(sizes, data["fingerprint"], packed.manifest["counts"]["steps"])


def _verify_rows(packed: PackedSteps, lengths: BundleLengths, capacity: int) -> None:
    """Check that every step packs the bundles of its groups, and the fill in the manifest."""
    tally = Tally(capacity)
    for step in range(packed.manifest["counts"]["steps"]):
        tokens = lengths.of(packed.groups(step))
        items, offsets = packed.packing(step)
        if len(items) != len(tokens):
            raise InputError(f"{packed.path}: step {step} is not a packing of its groups: {REMEDY}")
        row = int(np.add.reduceat(tokens[items], offsets[:-1]).max())
        if row > capacity:
            raise InputError(
                f"{packed.path}: step {step} has a row of {row} tokens, and its rows hold "
                f"{capacity}: {REMEDY}"
            )
        tally.add(tokens[items], offsets)
    for name, value in tally.summary().items():
        if packed.manifest.get(name) != value:
            raise InputError(
                f"{packed.path}/plan.json: {name} is {packed.manifest.get(name)}, and {value} for "
                f"the rows: {REMEDY}"
            )
