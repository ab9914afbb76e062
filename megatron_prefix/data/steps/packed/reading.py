"""Packed steps, memory-mapped: which groups form which row of which step.

    FOLDER/groups.npy       groups in the order of steps
    FOLDER/step_groups.npy  step s has groups[step_groups[s] : step_groups[s + 1]]
    FOLDER/items.npy        bundles of a step, row after row, as indices into the step's bundles
    FOLDER/row_items.npy    row r has items[row_items[r] : row_items[r + 1]]
    FOLDER/step_rows.npy    step s has the rows step_rows[s] to step_rows[s + 1]
    FOLDER/plan.json        the manifest, written last: data set, settings, counts, checksums

Two steps of three groups under `tree` sharing: step 0 has group 4 in one row and groups 0 and 2 in
another, step 1 has group 1.

    groups [4 0 2 1]     step_groups [0 3 4]
    items  [0 1 2 0]     row_items [0 1 3 4]     step_rows [0 2 3]

The bundles of a step are those of its groups in order, see sharing.py; under `tree` one per group.
The rows are those that one rank packs. Several ranks take them, or spread the bundles again, as
they do without packed steps.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.files import manifest_digest, sha256
from megatron_prefix.data.steps.compositions import StepSettings
from megatron_prefix.data.steps.packed.structure import (
    COLUMNS,
    REMEDY,
    check_keys,
    check_steps,
    not_a_packing,
)
from megatron_prefix.data.steps.packing import as_lists
from megatron_prefix.data.store import PreferenceDataset, read_manifest
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

FORMAT = "megatron_prefix packed plan"
VERSION = 1
MANIFEST = "plan.json"
SETTINGS = {
    "epochs": "train.epochs",
    "weights": "the weights of data.train",
    "set_epochs": "the epochs of data.train",
}
"""Names of settings in messages, unless they are those of the data section."""


def described(settings: StepSettings) -> dict[str, Any]:
    """The settings as a manifest has them. Those of several data sets, and `oversized: error`, are
    left out, so that plans without them stay as they were."""
    values = asdict(settings)
    if values["oversized"] == "error":
        values.pop("oversized")
    for name in ("weights", "set_epochs"):
        given = values.pop(name)
        if given is not None:
            values[name] = list(given)
    return values


def settings_of(manifest: dict[str, Any]) -> StepSettings:
    """The settings that `described` wrote."""
    values = dict(manifest["settings"])
    for name in ("weights", "set_epochs"):
        if name in values:
            values[name] = tuple(values[name])
    return StepSettings(**values)


class PackedSteps:
    """What `write_packed_steps` wrote, memory-mapped: a composition that also has rows.

    `manifest` has `settings`, `counts` and what `describe_packed_steps` prints. Opening checks the
    manifest, shapes, and that every step packs its groups (structure.py; `check=False` leaves out
    the columns). `verify` compares all bytes. Both raise InputError.
    """

    def __init__(self, path: str | Path, *, check: bool = True) -> None:
        self.path = Path(path)
        self.manifest = _load(self.path)
        counts = self.manifest["counts"]
        self._columns: dict[str, np.ndarray] = {}
        lengths = {
            "groups": counts["groups"],
            "step_groups": counts["steps"] + 1,
            "items": counts["items"],
            "row_items": counts["rows"] + 1,
            "step_rows": counts["steps"] + 1,
        }
        for name, dtype in COLUMNS.items():
            file = self.path / f"{name}.npy"
            try:
                column = np.lib.format.open_memmap(file, mode="r")
            except Exception as error:  # a damaged header can raise anything
                raise InputError(f"{file} cannot be read ({error}): {REMEDY}") from error
            if column.dtype != dtype or column.shape != (lengths[name],):
                raise InputError(f"{file} is not what its manifest describes: {REMEDY}")
            self._columns[name] = column
        if check:
            check_steps(self.path, self.manifest, self._columns)

    @property
    def has_fixed_rows(self) -> bool:
        """Whether the run takes the rows as they are: packed by `rows_per_step`."""
        return self.manifest["settings"]["rows_per_step"] is not None

    def groups(self, step: int) -> np.ndarray:
        start, stop = self._between("step_groups", step)
        return np.array(self._columns["groups"][start:stop])

    def rows(self, step: int, tokens: list[int]) -> list[list[int]]:
        """The step's rows as indices of its bundles, whose lengths are `tokens`."""
        items, offsets = self.packing(step)
        if len(items) != len(tokens):
            raise not_a_packing(self.path, step)
        return as_lists(items, offsets)

    def packing(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(items, offsets) of the step: row r holds `items[offsets[r] : offsets[r + 1]]`.

        Raises InputError unless each bundle is there once.
        """
        # Step 1 of this module's head: row 2, row_items [3 4], items [0], offsets [0 1]
        first, last = self._between("step_rows", step)
        offsets = np.array(self._columns["row_items"][first : last + 1])
        items = np.array(self._columns["items"][offsets[0] : offsets[-1]])
        if not np.array_equal(np.sort(items), np.arange(len(items))):
            raise not_a_packing(self.path, step)
        return items, offsets - offsets[0]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The files by name, memory-mapped."""
        return self._columns

    def num_steps(self, epochs: int) -> int:
        """Number of steps; `epochs` must be the number they were packed for."""
        assert epochs == self.manifest["settings"]["epochs"], (epochs, self.manifest["settings"])
        return self.manifest["counts"]["steps"]

    def verify(self) -> None:
        """Compare all bytes with the manifest. Raises InputError."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.path / name) != entry["sha256"]:
                raise InputError(f"{self.path / name} is damaged: its SHA-256 differs: {REMEDY}")

    def is_of_these_files(self, dataset: PreferenceDataset) -> bool:
        """Whether a data set's files are unchanged since `pack` verified their bytes."""
        data = self.manifest["data"]
        seen = [data.get("seen"), *(part["seen"] for part in data.get("sets", []))]
        return files_seen(dataset) in seen

    def check(self, dataset: PreferenceDataset, settings: StepSettings, steps: int | None) -> None:
        """Refuse packed steps of other data or settings; the error has both values.

        `settings.epochs` is None for a run of `steps` steps, which must end before a last step
        that the end of the packed epochs cuts.
        """
        data, packed = self.manifest["data"], self.manifest["settings"]
        differing = []
        if data["fingerprint"] != dataset.fingerprint:
            differing.append(
                f"data.train is {dataset.fingerprint[:16]}… of {counted(len(dataset), 'group')} "
                f"and was {data['fingerprint'][:16]}… of {data['groups']} when packed"
            )
        ours = described(settings)
        for name in {**packed, **ours}:
            default = "error" if name == "oversized" else None
            value, then = ours.get(name, default), packed.get(name, default)
            if value != then and not (name == "epochs" and steps):
                setting = SETTINGS.get(name, f"data.{name}")
                differing.append(f"{setting} is {value} and was {then} when packed")
        if differing:
            raise InputError(
                f"data.plan = {self.path} does not match: {'; '.join(differing)}. Pack again with "
                "the run's settings, or remove data.plan"
            )
        whole = self.manifest["counts"]["whole_steps"]
        if steps and steps > whole:
            raise InputError(
                f"data.plan = {self.path} has {whole} whole steps, and train.steps is {steps}: "
                "pack again for more steps"
            )

    def _between(self, name: str, index: int) -> tuple[int, int]:
        column = self._columns[name]
        if not 0 <= index < len(column) - 1:
            raise IndexError(f"step {index} of {len(column) - 1} packed steps")
        start, stop = column[index : index + 2].tolist()
        return start, stop


def is_packed_steps(path: str | Path) -> bool:
    """Whether `path` is a folder that `write_packed_steps` wrote."""
    return (Path(path) / MANIFEST).is_file()


def describe_packed_steps(manifest: dict[str, Any]) -> str:
    """One line: number of steps and rows, fill, and how even the rows are."""
    counts, settings = manifest["counts"], manifest["settings"]
    fill = 100 * manifest["fill"]
    repeated = ""
    if settings.get("oversized") == "split":
        repeated = (
            f"; {counted(manifest['repeated_tokens'], 'token')} repeated by data.oversized: split"
        )
    return (
        f"packed: {counted(counts['steps'], 'step')}, {counted(counts['rows'], 'row')} of "
        f"{counted(settings['row_capacity'], 'token')}, {counted(counts['groups'], 'group')}, "
        f"{counted(manifest['tokens'], 'token')}; fill {fill:.2f} %, {100 - fill:.2f} % unused; "
        f"longest row of a step over its mean {manifest['row_max_over_mean']:.3f}{repeated}"
    )


def files_seen(dataset: PreferenceDataset) -> dict[str, list[int]]:
    """[bytes, time of last change in ns] of every file of a data set, the manifest last."""
    paths = {**dataset.files, ".json": dataset.manifest_path}
    stats = {name: path.stat() for name, path in paths.items()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _load(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"there are no packed steps in {path}: {file} is missing. Make them with "
            "megatron-prefix pack"
        )
    manifest = read_manifest(file, FORMAT, (VERSION,), command="pack", remedy=REMEDY)
    if manifest_digest(manifest) != manifest.get("sha256"):
        raise InputError(f"{file} is damaged or was changed: its SHA-256 differs: {REMEDY}")
    check_keys(manifest, file)
    return manifest
