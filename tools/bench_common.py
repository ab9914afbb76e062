"""Helpers of all benchmarks: environment, files of results, and running out of memory."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMIT = "MEGATRON_PREFIX_COMMIT"
"""Environment variable with the commit, if the checkout has no git repository."""
NOT_RUN = "out of memory"

Row = dict[str, object]
T = TypeVar("T")


def git(*command: str) -> str:
    """Output of a git command in this checkout; empty if it is no repository or git is missing."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def environment() -> dict[str, str]:
    """Device, versions, commit, date and command of this run."""
    commit = git("rev-parse", "--short", "HEAD") or os.environ.get(COMMIT) or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": "python " + shlex.join([f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def table(rows: list[Row]) -> str:
    """A Markdown table with one column per key. If a row lacks a key, its cell is empty."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    cells = [" | ".join(str(row.get(key, "")) for key in keys) for row in rows]
    return "\n".join(lines + [f"| {line} |" for line in cells])


class Results:
    """A table in benchmarks/results/NAME.{md,json}; the files are complete after every row.

    The environment is recorded first, before anything is measured. `notes` may change until the
    last row.
    """

    def __init__(self, name: str, notes: str = "") -> None:
        self.name, self.notes, self.environment = name, notes, environment()
        self.rows: list[Row] = []

    def append(self, *rows: Row) -> None:
        """Add rows and write the files."""
        self.rows += rows
        self.write()

    def text(self) -> str:
        where = [f"- {key}: `{value}`" for key, value in self.environment.items()]
        return "\n".join([table(self.rows), "", self.notes, "", *where])

    def write(self) -> None:
        """Write the files again. If there is no row yet, do nothing."""
        if not self.rows:
            return
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.name}.md").write_text(self.text() + "\n", encoding="utf-8")
        result = {"environment": self.environment, "notes": self.notes, "rows": self.rows}
        text = json.dumps(result, indent=1) + "\n"
        (RESULTS / f"{self.name}.json").write_text(text, encoding="utf-8")

    def finish(self) -> None:
        """Write the files and print the table."""
        self.write()
        print(self.text() if self.rows else f"{self.name}: nothing was measured", flush=True)


def publish(name: str, rows: list[Row], notes: str) -> None:
    """Print the table and write it, with its environment, to benchmarks/results/NAME.{md,json}."""
    results = Results(name, notes)
    results.append(*rows)
    results.finish()


def unless_out_of_memory(measure: Callable[[], T]) -> T | None:
    """The result of `measure`, or None if the device has too little memory for it."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        print(f"{NOT_RUN}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    free_memory()  # only here: inside `except` the error still refers to the tensors
    return None


def free_memory() -> None:
    """Free memory that only cycles of references or the allocator still have."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
