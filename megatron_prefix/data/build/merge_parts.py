"""Data sets that were built in parts, on one machine or many -> the one they are parts of.

Every byte is what one build of all inputs in the same order writes. The exceptions are what only
one build can see: a prompt or a record that occurs in several parts is not recognised as such.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.data.build.combine import combine
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_checksums
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.errors import InputError

GROUPS = 4096
"""Groups copied at a time."""


def merge_datasets(prefixes: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Write the data set `output` of all `prefixes`, in order, and return its manifest.

    Raises InputError where a part is damaged, or was built by another tokenizer, in another
    format or with other options.
    """
    parts = [PreferenceDataset(prefix) for prefix in prefixes]
    for part in parts:
        _check_alike(parts[0], part)
        verify_checksums(part)
    first = parts[0].manifest
    inputs = [path for part in parts for path in part.manifest["options"].get("inputs", [])]
    options = {**first["options"], "inputs": inputs} if inputs else first["options"]
    report: dict[str, Any] = {}
    with DatasetWriter(output, first["tokenizer"], options) as writer:
        before = 0
        for part in parts:
            for start in range(0, len(part), GROUPS):
                block = part.block(start, min(start + GROUPS, len(part)))
                block.columns["group_records"] = block.columns["group_records"] + before
                writer.add_block(block)
            combine(report, _report_behind(part, before))
            before += _num_records(part)
        return writer.finish(report)


def _report_behind(part: PreferenceDataset, before: int) -> dict[str, Any]:
    """A part's report where `before` records come first; only repetitions go by their number."""
    report = copy.deepcopy(part.manifest["report"])
    if "duplicates" in report:
        pairs = report["duplicates"]["records"]
        report["duplicates"]["records"] = [[before + a, before + b] for a, b in pairs]
    return report


def _num_records(part: PreferenceDataset) -> int:
    """Records of its input, those without a group included."""
    return part.manifest["report"].get("num_records", int(part.group_records[-1]) + 1)


def _check_alike(first: PreferenceDataset, other: PreferenceDataset) -> None:
    def described(dataset: PreferenceDataset) -> dict[str, Any]:
        manifest = dataset.manifest
        tokenizer = {f"tokenizer {k}": v for k, v in manifest["tokenizer"].items() if k != "name"}
        options = {f"option {k}": v for k, v in manifest["options"].items() if k != "inputs"}
        return {**tokenizer, **options, "format": manifest["report"].get("format")}

    ours, theirs = described(first), described(other)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{other.prefix} has {name} {theirs.get(name)!r}, {first.prefix} has "
                f"{ours.get(name)!r}: build all parts by one tokenizer with the same options"
            )
