"""Checks of a plan: its bytes, its offsets, that every step packs its groups, and that rows fit.

Steps are read one after another. What needs the lengths of trees needs the data set beside it.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.data.files.columns import is_partition
from megatron_prefix.data.steps.composition import PlanSettings
from megatron_prefix.data.steps.packed_steps import REMEDY, PackedPlan
from megatron_prefix.data.steps.write_packed_steps import Bundles, Tally
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError

CHUNK = 1 << 20


def verify_plan(plan: PackedPlan, dataset: PreferenceDataset | None = None) -> None:
    """Check a plan's checksums and layout; with its data set also that every row fits.

    Memory is that of a step and a number a group; with the data set one a bundle. Raises
    InputError, naming the file or the step.
    """
    plan.verify()
    counts = plan.manifest["counts"]
    for name, total in (("step_groups", "groups"), ("row_items", "items"), ("step_rows", "rows")):
        if not is_partition(plan.column(name), counts[total], 1):
            raise InputError(f"{plan.path}/{name}.npy: offsets do not ascend: {REMEDY}")
    _verify_groups(plan)
    if dataset is None:
        for step in range(counts["steps"]):
            plan.packing(step)
        return
    settings = PlanSettings(**plan.manifest["settings"])
    plan.check(dataset, settings, None)
    _verify_rows(plan, Bundles(dataset, settings.sharing, settings.row_capacity))


def _verify_groups(plan: PackedPlan) -> None:
    """Every group of the data set once an epoch."""
    groups, num_groups = plan.column("groups"), plan.manifest["data"]["groups"]
    seen = np.zeros(num_groups, np.int32)
    for start in range(0, len(groups), CHUNK):
        chunk = groups[start : start + CHUNK]
        if chunk.min() < 0 or chunk.max() >= num_groups:
            raise InputError(f"{plan.path}/groups.npy names a group outside the data set: {REMEDY}")
        seen += np.bincount(chunk, minlength=num_groups)
    epochs = plan.manifest["settings"]["epochs"]
    for group in np.flatnonzero(seen != epochs)[:1].tolist():
        raise InputError(
            f"{plan.path}: group {group} stands in it {seen[group]} times, in {epochs} epochs: "
            f"{REMEDY}"
        )


def _verify_rows(plan: PackedPlan, bundles: Bundles) -> None:
    """Every step packs the bundles of its groups, none over the capacity, filled as it says."""
    capacity = plan.manifest["settings"]["row_capacity"]
    tally = Tally(capacity)
    for step in range(plan.manifest["counts"]["steps"]):
        tokens = bundles.of(plan.groups(step))
        items, offsets = plan.packing(step)
        if len(items) != len(tokens):
            raise InputError(f"{plan.path}: step {step} is not a packing of its groups: {REMEDY}")
        row = int(np.add.reduceat(tokens[items], offsets[:-1]).max())
        if row > capacity:
            raise InputError(
                f"{plan.path}: step {step} has a row of {row} tokens, and its rows hold "
                f"{capacity}: {REMEDY}"
            )
        tally.add(tokens[items], offsets)
    for name, value in tally.summary().items():
        if plan.manifest.get(name) != value:
            raise InputError(
                f"{plan.path}/plan.json: {name} is {plan.manifest.get(name)}, and the rows make "
                f"it {value}: {REMEDY}"
            )
