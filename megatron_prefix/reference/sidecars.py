"""Sidecars: reference log-probabilities in a file that `score` writes and training reads.

    score:   every response of data.train, and of data.valid if it is set, under the reference
    file:    safetensors; one float64 array per data set, named by its fingerprint
    reading: refused unless data set, tokenizer and reference model are those of the scoring

While `score` runs, its scores so far are saved in FILE.partial/. The same command continues from
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError, RunError
from megatron_prefix.text import counted

FORMAT = "megatron_prefix reference log-probabilities"
VERSION = "1"
HEADER = "megatron_prefix"
"""Key of the file's metadata: JSON of format, version, model, datasets and a checksum."""
HEADS = ".heads"
"""After a data set's fingerprint: the part of both sides' log-probabilities that is of their first
tokens, as many as the shorter side has; for `loss.ld_alpha`, of which it does not depend."""


def write_sidecar(
    path: str,
    model: str,
    scores: list[tuple[PreferenceDataset, np.ndarray]],
    heads: list[np.ndarray] | None = None,
) -> None:
    """Write the log-probabilities, float64 [responses] per data set, of the model whose
    fingerprint is `model`, and `heads` [pairs, 2] of the same data sets if they are given. `path`
    is replaced in one step."""
    described = {
        data.fingerprint: {
            "prefix": data.prefix.name,
            "responses": len(data.response_lengths),
            "tokenizer": data.manifest["tokenizer"]["fingerprint"],
        }
        for data, _ in scores
    }
    header = {"format": FORMAT, "version": VERSION, "model": model, "datasets": described}
    temporary = f"{path}.tmp"
    arrays = {data.fingerprint: np.ascontiguousarray(logps) for data, logps in scores}
    for (data, _), own in zip(scores, heads or [], strict=heads is not None):
        arrays[data.fingerprint + HEADS] = np.ascontiguousarray(own)
    header["sha256"] = _digest(header, arrays)
    try:  # one key: safetensors writes several keys in any order
        save_file(arrays, temporary, {HEADER: json.dumps(header)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        Path(temporary).unlink(missing_ok=True)
        raise _unwritten(path, error) from error


def _digest(header: dict, arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over header and arrays."""
    # The header's own checksum is left out, so that a reader can compute it again.
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _unwritten(path: str, error: Exception) -> RunError:
    return RunError(
        f"--output {path}: cannot be written ({error}). Free some space; the same command then "
        "continues from the scores that were saved"
    )


def sidecar_model(path: str) -> str:
    """The fingerprint of the model that made a file which `read_sidecar` has read."""
    with safe_open(path, "numpy") as file:
        return str(json.loads(file.metadata()[HEADER])["model"])


def read_sidecar(path: str, model: str | None, dataset: PreferenceDataset) -> np.ndarray:
    """The log-probabilities of `dataset`'s responses, float64 [responses].

    Raises InputError if the file is damaged, or was made with another model, data set or
    tokenizer; the message has both fingerprints. With `model` None any model is taken.
    """
    try:
        with safe_open(path, "numpy") as file:
            names = set(file.keys())
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise InputError(f"{path}: not a file that megatron-prefix score wrote")
            _check_origin(path, header["model"], header["datasets"], model, dataset)
            if dataset.fingerprint not in names:
                raise InputError(f"{path}: the end of the file is missing; score again")
            arrays = {name: file.get_tensor(name) for name in names}
            if _digest(header, arrays) != header["sha256"]:
                raise InputError(f"{path}: damaged, its SHA-256 has changed; score again")
            logps = arrays[dataset.fingerprint]
    except (
        *(OSError, SafetensorError, ValueError, KeyError, TypeError),
        *(AttributeError, RecursionError),
    ) as error:
        if isinstance(error, InputError):
            raise
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read as reference log-probabilities ({text})"
        ) from None
    if logps.shape != (len(dataset.response_lengths),) or logps.dtype != np.float64:
        raise InputError(
            f"{path}: {logps.dtype} {logps.shape} does not fit the {len(dataset.response_lengths)} "
            f"responses of {dataset.prefix}; score again"
        )
    if not (np.isfinite(logps).all() and (logps <= 0).all()):
        raise InputError(f"{path}: has values that are not log-probabilities; score again")
    return logps


def read_heads(path: str, dataset: PreferenceDataset) -> np.ndarray:
    """The heads of both sides of `dataset`'s pairs, float64 [pairs, 2], of a file that
    `read_sidecar` has read. Raises InputError if they are not in the file."""
    with safe_open(path, "numpy") as file:
        name = dataset.fingerprint + HEADS
        if name not in set(file.keys()):
            raise InputError(
                f"{path}: made without loss.ld_alpha, which needs the log-probabilities of "
                "responses' first tokens: score again with loss.ld_alpha in the configuration"
            )
        heads = file.get_tensor(name)
    is_sound = heads.dtype == np.float64 and heads.shape == (len(dataset.pair_weights), 2)
    if not is_sound or not np.isfinite(heads).all():
        raise InputError(f"{path}: the heads do not fit {dataset.prefix}; score again")
    return heads


def _check_origin(
    path: str, saved_model: str, described: dict, model: str | None, dataset: PreferenceDataset
) -> None:
    if model is not None and saved_model != model:
        raise InputError(
            f"{path}: made with a reference model of fingerprint {saved_model[:16]}…, but this "
            f"run's model has {model[:16]}…: score again with this run's model section, train.seed "
            "and dtype"
        )
    if dataset.fingerprint not in described:
        tokenizers = {entry["tokenizer"] for entry in described.values()}
        ours = dataset.manifest["tokenizer"]["fingerprint"]
        if ours not in tokenizers:
            raise InputError(
                f"{path}: made with tokenizer {' '.join(t[:16] for t in sorted(tokenizers))}…, "
                f"but {dataset.prefix} has {ours[:16]}…: score again"
            )
        known = ", ".join(f"{v['prefix']} ({k[:16]}…)" for k, v in described.items())
        raise InputError(
            f"{path}: made from data sets {known}, but {dataset.prefix} has fingerprint "
            f"{dataset.fingerprint[:16]}…: score again"
        )
    own = described[dataset.fingerprint]
    if own["responses"] != len(dataset.response_lengths):
        raise InputError(
            f"{path}: made for {counted(own['responses'], 'response')}, and {dataset.prefix} has "
            f"{len(dataset.response_lengths)}: score again"
        )


class PartialScores:
    """Scores so far on disk, FILE.partial/NAME.npz: sums of log-probabilities, and times that
    each response ran.

    `key` is everything that the scores depend on. Scores saved under another key are ignored, and
    scoring starts from scratch.
    """

    def __init__(self, path: str, name: str, key: dict, num_responses: int) -> None:
        self._path = path
        self._directory = Path(f"{path}.partial")
        self._file = self._directory / f"{name}.npz"
        self._key = json.dumps(key, sort_keys=True)
        self.step = 0
        self.sums = np.zeros((2, num_responses))
        self._resume()

    def _resume(self) -> None:
        try:
            with np.load(self._file, allow_pickle=False) as saved:
                if str(saved["key"]) == self._key and saved["sums"].shape == self.sums.shape:
                    self.step, self.sums = int(saved["step"]), saved["sums"].astype(np.float64)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return  # nothing saved yet, or a torn file: start from scratch

    def save(self, step: int) -> None:
        """Save the sums after `step` steps. Raises RunError if they cannot be written."""
        self.step = step
        temporary = self._file.with_suffix(".tmp")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, key=self._key, step=step, sums=self.sums)
            os.replace(temporary, self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # FILE.partial may be a file
                temporary.unlink(missing_ok=True)
            raise _unwritten(self._path, error) from error

    def discard(self) -> None:
        """Remove everything that was saved for FILE."""
        shutil.rmtree(self._directory, ignore_errors=True)
