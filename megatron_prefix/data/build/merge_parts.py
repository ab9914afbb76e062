"""Data sets that were built in parts, on one machine or several -> one data set.

The files have the same bytes as those of one build of all inputs in the same order. There is one
exception: a prompt or a record that occurs in several parts is not recognised as repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.data.build.combine import combine
from megatron_prefix.data.store import DatasetWriter, PreferenceDataset
from megatron_prefix.errors import InputError

GROUPS = 4096
"""Groups that are copied together."""


def merge_datasets(prefixes: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Write all data sets `prefixes`, in order, to `output` and return its manifest.

    Raises InputError if a part is damaged, or if the parts differ in tokenizer, format or options.
    """
    parts = [PreferenceDataset.verified(prefix) for prefix in prefixes]
    for part in parts:
        _check_same_settings(parts[0], part)
    first = parts[0].manifest
    inputs = [path for part in parts for path in part.manifest["options"].get("inputs", [])]
    options = {**first["options"], "inputs": inputs} if inputs else first["options"]
    report: dict[str, Any] = {}
    with DatasetWriter(output, first["tokenizer"], options) as writer:
        before = 0
        for part in parts:
            for start in range(0, len(part), GROUPS):
                block = part.block(start, min(start + GROUPS, len(part)))
                # Parts of 10 and 5 records: record 3 of the second part is record 13 of the whole.
                block.columns["group_records"] = block.columns["group_records"] + before
                writer.add_block(block)
            combine(report, _shifted_report(part, before))
            before += _num_records(part)
        return writer.finish(report)


def _shifted_report(part: PreferenceDataset, before: int) -> dict[str, Any]:
    """A part's report after `before` records of other parts; only duplicates have numbers."""
    report = copy.deepcopy(part.manifest["report"])
    if "duplicates" in report:
        # After 10 records, [2, 0] becomes [12, 10]: record 12 repeats record 10.
        pairs = report["duplicates"]["records"]
        report["duplicates"]["records"] = [[before + a, before + b] for a, b in pairs]
    return report


def _num_records(part: PreferenceDataset) -> int:
    """Records of its input, including those without a group."""
    return part.manifest["report"].get("num_records", int(part.group_records[-1]) + 1)


def _check_same_settings(first: PreferenceDataset, other: PreferenceDataset) -> None:
    def settings(dataset: PreferenceDataset) -> dict[str, Any]:
        manifest = dataset.manifest
        tokenizer = {f"tokenizer {k}": v for k, v in manifest["tokenizer"].items() if k != "name"}
        options = {f"option {k}": v for k, v in manifest["options"].items() if k != "inputs"}
        return {**tokenizer, **options, "format": manifest["report"].get("format")}

    ours, theirs = settings(first), settings(other)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{other.prefix} has {name} {theirs.get(name)!r}, {first.prefix} has "
                f"{ours.get(name)!r}: build all parts with one tokenizer and the same options"
            )
