"""metrics.jsonl: one JSON line per training step or evaluation, and how to read it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_prefix.config import Config
from megatron_prefix.errors import InputError
from megatron_prefix.trackers.run_folder import METRICS_FILE, RunFile, starting, writing
from megatron_prefix.trackers.tracker import Status

SAMPLE_KEYS = {"step", "prompt", "text", "kind", "answer", "ended"}
"""Keys that a sample answer has."""


def read_metrics(run: str | Path) -> list[dict]:
    """All complete lines of a run's metrics file. Raises InputError if there are none."""
    path = Path(run)
    path = path / METRICS_FILE if path.is_dir() else path
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a run's metrics ({error})") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(texts):
                break  # cut short when the run was killed
            raise InputError(f"{path}, line {number}: not a metrics line") from None
        lines.append(line)
    if not lines:
        raise InputError(f"{path}: no complete line; give the directory of a run that has begun")
    return lines


class JsonlTracker:
    """Appends a line to metrics.jsonl in `logging.output` and flushes it, so that a kill loses
    nothing that was logged.

    A resumed run first removes the lines after the loaded step and an incomplete last line.
    Figures are not recorded: they are files of their own.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._file: TextIO | None = None

    def start(self, config: Config, step: int) -> None:
        self._folder = Path(config.logging.output)
        path = self._folder / METRICS_FILE
        with starting(config):
            if path.exists():
                _cut_back(path, step)
            self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self._folder, step):
            self._write(json.dumps({"step": step, **values}) + "\n")

    def _write(self, line: str) -> None:
        assert self._file is not None, "log before start"
        self._file.write(line)
        self._file.flush()

    def figure(self, name: str, path: str | Path) -> None:
        """Not recorded: metrics.jsonl has numbers only."""

    def finish(self, status: Status) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # `log` has raised for the line that did not fit
                self._file.close()


class SamplesFile:
    """samples.jsonl in `logging.output`: records of a step, flushed. Its first use in a run removes
    the lines after the step from which the run continues."""

    def __init__(self, config: Config, step: int) -> None:
        self._folder = Path(config.logging.output)
        path = self._folder / RunFile.SAMPLES
        with starting(config):
            if path.exists():
                _cut_back(path, step)

    def add(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each record. Raises RunError."""
        lines = [json.dumps({"step": step, **x}, ensure_ascii=False) + "\n" for x in records]
        with writing(self._folder, step):
            path = self._folder / RunFile.SAMPLES
            with path.open("a", encoding="utf-8", errors="replace") as file:
                file.writelines(lines)


def read_samples(run: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a run's sample answers; none without the file."""
    try:
        texts = (Path(run) / RunFile.SAMPLES).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    lines = []
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and SAMPLE_KEYS <= line.keys():
                lines.append(line)
    return lines


def _cut_back(path: Path, step: int) -> None:
    """Keep the complete lines up to `step`."""
    remaining = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                remaining.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(remaining))
    os.replace(temporary, path)
