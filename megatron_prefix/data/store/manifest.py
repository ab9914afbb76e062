"""The manifest of a data set: its files and counts, and a fingerprint of its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prefix.data.files import manifest_digest
from megatron_prefix.data.images import ImageStore
from megatron_prefix.data.store.columns import COLUMNS, OPTIONAL_COLUMNS, column, least_tail
from megatron_prefix.data.store.manifest_keys import check_keys
from megatron_prefix.errors import InputError

FORMAT = "megatron_prefix preference data set"
VERSION = 3
VERSIONS = (2, 3)
"""Versions that can be read. Version 2 has no `columns`: it has COLUMNS and nothing else."""
INDEXED_FILES = (".bin", ".idx")
FILES = (*INDEXED_FILES, *(f".tree/{name}.npy" for name in COLUMNS))
"""Files that every data set has."""


def suffix_path(prefix: Path, suffix: str) -> Path:
    """`data/hh` and `.tree/node_parents.npy` -> `data/hh.tree/node_parents.npy`."""
    return Path(f"{prefix}{suffix}")


def column_file(name: str) -> str:
    """`pair_betas` -> `.tree/pair_betas.npy`."""
    return f".tree/{name}.npy"


def describe_columns(tails: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """The manifest's `columns`: the type and the shape of one entry of every column."""
    return {
        name: {"dtype": column(name).dtype.name, "shape": list(tail)}
        for name, tail in tails.items()
    }


def columns_of(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The columns that a data set has, each with the shape of one entry."""
    if manifest["version"] == 2:
        return {name: least_tail(name) for name in COLUMNS}
    return {name: tuple(about["shape"]) for name, about in manifest["columns"].items()}


def fingerprint(
    files: Mapping[str, Mapping[str, Any]],
    tokenizer: Mapping[str, Any],
    images: Mapping[str, Any] | None = None,
) -> str:
    """SHA-256 over the checksums of all files, in the order of their names, the tokenizer, and the
    image processor of the manifest's entry `images`."""
    # Sorted, so that the order in which a manifest lists its files does not matter. No path is part
    # of it: a data set that is moved keeps its fingerprint.
    lines = [f"{name} {files[name]['sha256']}\n" for name in sorted(files)]
    lines.append(f"tokenizer {tokenizer['fingerprint']}\n")
    if images is not None:
        lines.append(f"image processor {images['processor']['fingerprint']}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_manifest(prefix: Path) -> dict[str, Any]:
    """The manifest of data set `prefix`. Raises InputError if a file is missing or cut off."""
    path = suffix_path(prefix, ".json")
    if not path.is_file():
        raise InputError(
            f"there is no data set {prefix}: {path} is missing. Make it with megatron-prefix "
            "build, and give the prefix without a file ending"
        )
    manifest = read_manifest(
        path, FORMAT, VERSIONS, command="build", remedy="build the data set again"
    )
    _check_columns(manifest, path)
    check_keys(manifest, path)
    _check_sums(manifest, path)
    for name, entry in manifest["files"].items():
        _check_file(suffix_path(prefix, name), entry["bytes"])
    if manifest["version"] > 2:
        _check_folder(prefix, manifest)
    return manifest


def read_manifest(
    path: Path, format: str, versions: Sequence[int], *, command: str, remedy: str
) -> dict[str, Any]:
    """The JSON object in `path`, which must be of this format and one of these versions.

    Raises InputError if it is not; the message names the `command` that writes such files, or ends
    with the `remedy`. The caller checks the other keys.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise InputError(f"{path} is not a manifest that megatron-prefix {command} wrote")
    if manifest.get("version") not in versions:
        raise InputError(
            f"{path} has version {manifest.get('version')}, and this program reads version "
            f"{' and '.join(map(str, versions))}: {remedy}"
        )
    return manifest


def _check_columns(manifest: dict[str, Any], path: Path) -> None:
    """Refuse columns and files that this program does not know, and columns that are missing."""
    columns, files = manifest.get("columns"), manifest.get("files")
    if manifest["version"] == 2:
        columns = describe_columns(columns_of(manifest))
    if not isinstance(columns, dict) or not isinstance(files, dict):
        missing = "files" if isinstance(columns, dict) else "columns"
        raise InputError(f"{path} lacks '{missing}': build the data set again")
    known = {*COLUMNS, *OPTIONAL_COLUMNS}
    for name in [name for name in columns if name not in known]:
        raise _unknown(path, "column", name)
    expected = {*INDEXED_FILES, *map(column_file, columns)}
    if "images" in manifest:
        expected |= {*ImageStore.FILES}
    for name in [name for name in files if name not in expected]:
        raise _unknown(path, "file", f"PREFIX{name}")
    for name in sorted(expected - files.keys()):
        raise InputError(f"{path} lacks '{name}' in its files: build the data set again")
    for name in [name for name in COLUMNS if name not in columns]:
        raise InputError(f"{path} lacks the column {name}: build the data set again")
    for name, entry in columns.items():
        about = column(name)
        fields = entry if isinstance(entry, dict) else {}
        shape = fields.get("shape")
        sound = (
            fields.get("dtype") == about.dtype.name
            and isinstance(shape, list)
            and len(shape) == len(about.tail)
            and all(type(size) is int and size >= 0 for size in shape)
            and all(x in (None, y) for x, y in zip(about.tail, shape, strict=True))
        )
        if not sound:
            raise InputError(f"{path} is damaged: column {name} is {entry}: build it again")


def _unknown(path: Path, kind: str, name: str) -> InputError:
    return InputError(
        f"{path} has the {kind} {name}, which this version of megatron_prefix does not know, and "
        "which may change what the data means: install a newer version, or build the data set "
        "again with this one"
    )


def _check_folder(prefix: Path, manifest: dict[str, Any]) -> None:
    """Refuse columns in the folder that the manifest does not list."""
    for file in sorted(suffix_path(prefix, ".tree").glob("*.npy")):
        if f".tree/{file.name}" not in manifest["files"]:
            raise InputError(
                f"{file} is not a file of this data set, {prefix}.json does not list it: move it "
                "away, or build the data set again"
            )


def _check_sums(manifest: dict[str, Any], path: Path) -> None:
    """Compare the manifest with its own checksum, and the fingerprint with what it is made of."""
    if manifest_digest(manifest) != manifest["sha256"]:
        raise InputError(
            f"{path} is damaged or was changed: its SHA-256 differs: build the data set again"
        )
    own = fingerprint(manifest["files"], manifest["tokenizer"], manifest.get("images"))
    if own != manifest["fingerprint"]:
        raise InputError(f"{path} is damaged: its fingerprint is wrong: build the data set again")


def _check_file(path: Path, size: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing: build the data set again")
    if (actual := path.stat().st_size) != size:
        raise InputError(
            f"{path} has {actual} bytes, and {size} in its manifest: build the data set again"
        )
