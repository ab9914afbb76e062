"""The manifest of a data set: its files and counts, and a fingerprint of its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prefix.data.store.columns import COLUMNS
from megatron_prefix.errors import InputError

FORMAT = "megatron_prefix preference data set"
VERSION = 2
COUNTS = ("groups", "nodes", "responses", "pairs", "tokens")
FILES = (".bin", ".idx", *(f".tree/{name}.npy" for name in COLUMNS))


def suffix_path(prefix: Path, suffix: str) -> Path:
    """`data/hh` and `.tree/node_parents.npy` -> `data/hh.tree/node_parents.npy`."""
    return Path(f"{prefix}{suffix}")


def fingerprint(files: Mapping[str, Mapping[str, Any]], tokenizer: Mapping[str, Any]) -> str:
    """SHA-256 over the checksums of all files, in the order of their names, and the tokenizer."""
    # Sorted, so that the order in which a manifest lists its files does not matter. No path is part
    # of it: a data set that is moved keeps its fingerprint.
    lines = [f"{name} {files[name]['sha256']}\n" for name in sorted(files)]
    lines.append(f"tokenizer {tokenizer['fingerprint']}\n")
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
        path, FORMAT, VERSION, command="build", remedy="build the data set again"
    )
    _check_keys(manifest, path)
    for name in FILES:
        _check_file(suffix_path(prefix, name), manifest["files"][name]["bytes"])
    return manifest


def read_manifest(
    path: Path, format: str, version: int, *, command: str, remedy: str
) -> dict[str, Any]:
    """The JSON object in `path`, which must be of this format and version.

    Raises InputError if it is not; the message names the `command` that writes such files, or ends
    with the `remedy`. The caller checks the other keys.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise InputError(f"{path} is not a manifest that megatron-prefix {command} wrote")
    if manifest.get("version") != version:
        raise InputError(
            f"{path} has version {manifest.get('version')}, and this program reads version "
            f"{version}: {remedy}"
        )
    return manifest


def _check_keys(manifest: dict[str, Any], path: Path) -> None:
    try:
        numbers = [manifest["counts"][name] for name in COUNTS]
        numbers.append(manifest["tokenizer"]["vocab_size"])
        numbers += [manifest["files"][name]["bytes"] for name in FILES]
        texts = [manifest["files"][name]["sha256"] for name in FILES]
        texts += [manifest["fingerprint"], manifest["tokenizer"]["fingerprint"]]
        sound = manifest["dtype"] in ("uint16", "int32")
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks {error}: build the data set again") from error
    sound = sound and all(type(n) is int and n >= 0 for n in numbers)
    if not (sound and all(isinstance(text, str) for text in texts)):
        raise InputError(f"{path} is damaged: build the data set again")


def _check_file(path: Path, size: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing: build the data set again")
    if (actual := path.stat().st_size) != size:
        raise InputError(
            f"{path} has {actual} bytes, and {size} in its manifest: build the data set again"
        )
