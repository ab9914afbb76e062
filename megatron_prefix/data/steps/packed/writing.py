"""Pack the steps of a data set and write them; reading.py describes the files.

The folder is made under another name and moved into place when it is complete. Packing takes time
in proportion to all groups, and memory in proportion to the groups of one epoch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.files import ColumnWriter, file_entry, manifest_digest
from megatron_prefix.data.steps.compositions import PartBatches, RowBatches, StepSettings
from megatron_prefix.data.steps.packed.reading import (
    FORMAT,
    MANIFEST,
    VERSION,
    described,
    files_seen,
    is_packed_steps,
)
from megatron_prefix.data.steps.packed.structure import COLUMNS
from megatron_prefix.data.steps.packing import pack
from megatron_prefix.data.steps.sharing import all_bundles, all_parts, group_firsts
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

FLUSH = 1 << 16
"""Bundles collected before they are written."""

Progress = Callable[[int, int], None]


def write_packed_steps(
    dataset: PreferenceDataset,
    settings: StepSettings,
    output: str | Path,
    progress: Progress | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Pack `settings.epochs` epochs into the folder `output` and return its manifest.

    `settings` needs `row_capacity`, and `epochs`. If it has `weights`, which have no end, it needs
    `steps` instead, the number of steps. `progress` is called with (steps done, steps).
    Raises InputError if a bundle does not fit a row, or if the folder cannot be written.
    """
    if "\0" in str(output) or Path(output).name in ("", ".."):
        raise InputError(f"--output {str(output)!r} names no folder: give another name")
    output = Path(output)
    work = output.with_name(f".{output.name}.{os.getpid()}.packing")
    if output.exists() and not is_packed_steps(output):
        raise InputError(
            f"--output {output} exists and does not hold packed steps: give another name"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        manifest = _write(dataset, settings, work, progress, steps)
        if output.exists():
            os.replace(output, work.with_name(f"{work.name}.old"))
        os.replace(work, output)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(work.with_name(f"{work.name}.old"), ignore_errors=True)
    return manifest


class BundleLengths:
    """Lengths of all bundles of a data set in tokens, those beyond a row in parts if they are
    `split`. Raises InputError if one exceeds a row."""

    def __init__(
        self, dataset: PreferenceDataset, sharing: str, capacity: int, oversized: str = "error"
    ) -> None:
        is_split = oversized == "split"
        if is_split:
            group, self.tokens, self._repeated = all_parts(dataset, sharing, capacity)
        else:
            group, _, self.tokens = all_bundles(dataset, sharing)
            self._repeated = np.zeros_like(self.tokens)
        worst = int(self.tokens.argmax())
        if self.tokens[worst] > capacity:
            fault = f"in one row under --sharing {sharing}: raise it, set --oversized split, or"
            if is_split:
                fault = "for one response and its prompt, which are never cut: raise it, or"
            raise InputError(
                f"--row-capacity is {capacity} and {dataset.place(group[worst])} needs "
                f"{counted(self.tokens[worst], 'token')} {fault} build with a smaller --max-length"
            )
        self.firsts = None
        if sharing != "tree" or len(group) > len(dataset):
            self.firsts = group_firsts(group, len(dataset))

    def repeated(self, groups: np.ndarray) -> int:
        """Tokens of the bundles of `groups` that an earlier part of the same bundle has too."""
        return int(self._repeated[self._index(groups)].sum())

    def num_of(self, groups: np.ndarray) -> np.ndarray:
        """Number of bundles of each of `groups`."""
        if self.firsts is None:
            return np.ones(len(groups), np.int64)
        return self.firsts[groups + 1] - self.firsts[groups]

    def of(self, groups: np.ndarray) -> np.ndarray:
        """Lengths of the bundles of `groups`, one group after another."""
        return self.tokens[self._index(groups)]

    def _index(self, groups: np.ndarray) -> np.ndarray:
        """The bundles of `groups`, one group after another.

        Bundles of groups 0, 1, 2 at [0 1 | 2 | 3 4]: firsts [0 2 3 5]. Groups [2 0]: starts [3 0],
        counts [2 2], shift [0 2]; indices 0 1 2 3 + [3 3 -2 -2] = [3 4 0 1].
        """
        if self.firsts is None:
            return groups
        starts, counts = self.firsts[groups], self.num_of(groups)
        shift = np.cumsum(counts) - counts
        return np.arange(int(counts.sum())) + np.repeat(starts - shift, counts)


def _write(
    dataset: PreferenceDataset,
    settings: StepSettings,
    work: Path,
    progress: Progress | None,
    steps: int | None,
) -> dict[str, Any]:
    capacity = settings.row_capacity
    assert capacity is not None, settings
    bundles = BundleLengths(dataset, settings.sharing, capacity, settings.oversized)
    composition = settings.composition(dataset)
    num_steps = steps
    if num_steps is None:
        assert settings.epochs is not None, settings
        num_steps = composition.num_steps(settings.epochs)
    writer, tally, repeated = _StepWriter(work), Tally(capacity), 0
    for step in range(num_steps):
        groups = composition.groups(step)
        tokens = bundles.of(groups)
        if isinstance(composition, RowBatches):
            sizes = [len(bundles.of(row)) for row in composition.rows(step)]
            items, offsets = np.arange(len(tokens)), np.concatenate([[0], np.cumsum(sizes)])
        elif isinstance(composition, PartBatches):
            items, offsets = composition.packing(step)
        else:
            items, offsets = pack(tokens, capacity, settings.packing_method)
        writer.add(groups, items, offsets)
        tally.add(tokens[items], offsets)
        repeated += bundles.repeated(groups)
        if progress is not None:
            progress(step + 1, num_steps)
    counts = writer.close()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "data": _describe_data(dataset),
        "settings": described(settings),
        "counts": {**counts, "whole_steps": _whole_steps(dataset, settings, num_steps)},
        **tally.summary(),
        **({"repeated_tokens": repeated} if settings.oversized == "split" else {}),
        "files": {f"{name}.npy": file_entry(work / f"{name}.npy") for name in COLUMNS},
    }
    manifest["sha256"] = manifest_digest(manifest)
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _describe_data(dataset: PreferenceDataset) -> dict[str, Any]:
    """The data set as a manifest has it; several joined ones are listed too."""
    own = {"fingerprint": dataset.fingerprint, "groups": len(dataset)}
    if len(dataset.parts) == 1:
        return {**own, "seen": files_seen(dataset)}
    return {**own, "sets": [_describe_data(part) for part in dataset.parts]}


def _whole_steps(dataset: PreferenceDataset, settings: StepSettings, num_steps: int) -> int:
    """Number of steps that are the same in an endless run: all, or all but a last one that the end
    of the epochs cuts."""
    epochs = settings.epochs
    if settings.global_batch_size is None or settings.sort_by_length:
        return num_steps
    if epochs is None or settings.set_epochs is not None:
        return num_steps
    # 10 records of one group each in batches of 4: one epoch has steps of 4, 4 and 2 groups, but
    # the third step of an endless run has 4, so 2 steps are whole.
    last = num_steps - 1
    records = epochs * int(dataset.group_num_records.sum())
    if records <= settings.global_batch_size:
        return int(records == settings.global_batch_size)
    ending, endless = (
        replace(settings, epochs=limit).composition(dataset).groups(last)
        for limit in (epochs, None)
    )
    return num_steps if np.array_equal(ending, endless) else last


class _StepWriter:
    """Writes the columns, many steps at a time."""

    def __init__(self, folder: Path) -> None:
        self._files = {n: ColumnWriter(folder / f"{n}.npy", d) for n, d in COLUMNS.items()}
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._ends = dict.fromkeys(("step_groups", "row_items", "step_rows"), 0)
        self._waiting = 0
        for name in self._ends:
            self._files[name].write([0])
        self.counts = dict.fromkeys(("steps", "rows", "groups", "items"), 0)

    def add(self, groups: np.ndarray, items: np.ndarray, offsets: np.ndarray) -> None:
        # Steps with offsets [0 1 3] and [0 2] have row_items [0 | 1 3 | 5] and step_rows
        # [0 | 2 | 3]: all offsets count from the first step.
        counts, parts = self.counts, self._parts
        parts["row_items"].append(offsets[1:] + counts["items"])
        for name, more in zip(counts, (1, len(offsets) - 1, len(groups), len(items)), strict=True):
            counts[name] += more
        parts["groups"].append(groups)
        parts["items"].append(items)
        parts["step_groups"].append(np.array([counts["groups"]]))
        parts["step_rows"].append(np.array([counts["rows"]]))
        self._waiting += len(items)
        if self._waiting >= FLUSH:
            self._flush()

    def close(self) -> dict[str, int]:
        self._flush()
        for file in self._files.values():
            file.close()
        return self.counts

    def _flush(self) -> None:
        for name, parts in self._parts.items():
            if parts:
                self._files[name].write(np.concatenate(parts))
            parts.clear()
        self._waiting = 0


class Tally:
    """How full and how even rows are, over all steps."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tokens = self._rows = self._steps = 0
        self._unevenness = 0.0

    def add(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        """Add one step: the lengths of its bundles, row after row."""
        self.add_rows(np.add.reduceat(tokens, offsets[:-1]), np.zeros(1, np.int64))

    def add_rows(self, rows: np.ndarray, first_rows: np.ndarray) -> None:
        """Add steps: the tokens of their rows, and the number of each step's first row."""
        # Bundles [6 | 1 1]: rows of 6 and 2 tokens; the longest over the mean is 6 * 2 / 8 = 1.5.
        totals = np.add.reduceat(rows, first_rows)
        longest = np.maximum.reduceat(rows, first_rows)
        counts = np.diff(np.append(first_rows, len(rows)))
        for ratio in (longest * counts / totals).tolist():  # in the order of steps: the same sum
            self._unevenness += ratio
        self._tokens, self._rows = self._tokens + int(totals.sum()), self._rows + len(rows)
        self._steps += len(totals)

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "fill": round(self._tokens / (self._capacity * self._rows), 6),
            "row_max_over_mean": round(self._unevenness / self._steps, 6),
        }
