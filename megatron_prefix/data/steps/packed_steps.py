"""The packed index on disk: which groups form which row of which step.

    PLAN/groups.npy       groups in the order of steps
    PLAN/step_groups.npy  step s has groups[step_groups[s] : step_groups[s + 1]]
    PLAN/items.npy        bundles of a step, row after row, as indices into the step's bundles
    PLAN/row_items.npy    row r has items[row_items[r] : row_items[r + 1]]
    PLAN/step_rows.npy    step s has the rows step_rows[s] to step_rows[s + 1]
    PLAN/plan.json        the manifest, written last: data set, settings, counts, checksums

A step's bundles are those of its groups in order, see sharing.py; in `tree` mode one a group. The
rows are those that one rank packs; several ranks take them, or spread them, as they would without
a plan.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.data.files.checksums import manifest_digest, sha256
from megatron_prefix.data.steps.composition import PlanSettings
from megatron_prefix.data.steps.packing import as_lists
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.manifest import FILES, suffix_path
from megatron_prefix.errors import InputError

FORMAT = "megatron_prefix packed plan"
VERSION = 1
MANIFEST = "plan.json"
COLUMNS = {
    "groups": np.dtype("<i8"),
    "step_groups": np.dtype("<i8"),
    "items": np.dtype("<i4"),
    "row_items": np.dtype("<i8"),
    "step_rows": np.dtype("<i8"),
}
REMEDY = "make it again with megatron-prefix pack"


class PackedPlan:
    """A plan that `write_plan` wrote, memory-mapped: a composition with rows.

    `manifest` has `settings`, `counts` and what `describe_plan` prints. Opening checks sizes and
    shapes, `verify` all bytes; both raise InputError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _load(self.path)
        counts = self.manifest["counts"]
        self._columns = {}
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
                column = np.load(file, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # whatever a damaged header makes NumPy raise
                raise InputError(f"{file} cannot be read ({error}): {REMEDY}") from error
            if column.dtype != dtype or column.shape != (lengths[name],):
                raise InputError(f"{file} is not what the plan's manifest describes: {REMEDY}")
            self._columns[name] = column

    @property
    def has_fixed_rows(self) -> bool:
        """Whether its rows make the steps (`rows_per_step`) or only fill them."""
        return self.manifest["settings"]["rows_per_step"] is not None

    def groups(self, step: int) -> np.ndarray:
        start, stop = self._between("step_groups", step)
        return np.array(self._columns["groups"][start:stop])

    def rows(self, step: int, tokens: list[int]) -> list[list[int]]:
        """The step's rows as indices of its bundles, whose lengths are `tokens`."""
        items, offsets = self.packing(step)
        if len(items) != len(tokens):
            raise InputError(f"{self.path}: step {step} is not a packing of its groups: {REMEDY}")
        return as_lists(items, offsets)

    def packing(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The step's bundles row after row, and where its rows begin: each bundle once."""
        first, last = self._between("step_rows", step)
        offsets = np.array(self._columns["row_items"][first : last + 1])
        items = np.array(self._columns["items"][offsets[0] : offsets[-1]])
        if not np.array_equal(np.sort(items), np.arange(len(items))):
            raise InputError(f"{self.path}: step {step} is not a packing of its groups: {REMEDY}")
        return items, offsets - offsets[0]

    def column(self, name: str) -> np.ndarray:
        """One file of the plan, memory-mapped."""
        return self._columns[name]

    def num_steps(self, epochs: int) -> int:
        """Steps of the plan, which was made for its own number of epochs."""
        assert epochs == self.manifest["settings"]["epochs"], (epochs, self.manifest["settings"])
        return self.manifest["counts"]["steps"]

    def verify(self) -> None:
        """Compare all bytes with the manifest."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.path / name) != entry["sha256"]:
                raise InputError(f"{self.path / name} is damaged: its SHA-256 is another: {REMEDY}")

    def is_of_these_files(self, dataset: PreferenceDataset) -> bool:
        """Whether the data set's files are those, unchanged, whose bytes `pack` verified."""
        return self.manifest["data"].get("seen") == files_seen(dataset)

    def check(self, dataset: PreferenceDataset, settings: PlanSettings, steps: int | None) -> None:
        """Refuse a plan of other data or settings, naming both values.

        `settings.epochs` is None for a run of `steps` steps, which has to end before the plan's
        last, shorter step.
        """
        data, packed = self.manifest["data"], self.manifest["settings"]
        differing = []
        if data["fingerprint"] != dataset.fingerprint:
            differing.append(
                f"data.train is {dataset.fingerprint[:16]}… of {len(dataset)} groups, the plan's "
                f"{data['fingerprint'][:16]}… of {data['groups']}"
            )
        for name, value in asdict(settings).items():
            if value != packed[name] and not (name == "epochs" and steps):
                section = "train" if name == "epochs" else "data"
                differing.append(f"{section}.{name} is {value}, the plan's {packed[name]}")
        if differing:
            raise InputError(
                f"data.plan = {self.path} does not match: {'; '.join(differing)}. Pack again with "
                "the run's settings, or leave data.plan out"
            )
        whole = self.manifest["counts"]["whole_steps"]
        if steps and steps > whole:
            raise InputError(
                f"data.plan = {self.path} has {whole} whole steps and train.steps is {steps}: pack "
                "with more --epochs"
            )

    def _between(self, name: str, index: int) -> tuple[int, int]:
        column = self._columns[name]
        if not 0 <= index < len(column) - 1:
            raise IndexError(f"step {index} of a plan of {len(column) - 1} steps")
        start, stop = column[index : index + 2].tolist()
        return start, stop


def describe_plan(manifest: dict[str, Any]) -> str:
    """One line: steps, rows, fill and evenness of a whole plan."""
    counts, settings = manifest["counts"], manifest["settings"]
    fill = 100 * manifest["fill"]
    return (
        f"plan: {counts['steps']:,} steps, {counts['rows']:,} rows of {settings['row_capacity']:,} "
        f"tokens, {counts['groups']:,} groups, {manifest['tokens']:,} tokens; fill {fill:.2f} %, "
        f"{100 - fill:.2f} % unused; longest row of a step over its mean "
        f"{manifest['row_max_over_mean']:.3f}"
    )


def files_seen(dataset: PreferenceDataset) -> dict[str, list[int]]:
    """Size and time of change of every file of a data set."""
    stats = {name: suffix_path(dataset.prefix, name).stat() for name in (*FILES, ".json")}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _load(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"there is no plan {path}: {file} is missing. Make it with megatron-prefix pack"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}): {REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{file} is not the manifest of a plan made by megatron-prefix pack")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{file} has version {manifest.get('version')}, this reads {VERSION}: {REMEDY}"
        )
    if manifest_digest(manifest) != manifest.get("sha256"):
        raise InputError(f"{file} is damaged, or was changed: its SHA-256 is another: {REMEDY}")
    return manifest
