"""What benchmarks share: where they ran, and how results are kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def environment() -> dict[str, str]:
    """Device, versions, commit, date and command of this run."""
    root = Path(__file__).resolve().parent.parent

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True).stdout

    commit = git("rev-parse", "--short", "HEAD").strip() or "unknown"
    if git("status", "--porcelain", "--untracked-files=no").strip():
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


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table with a column a key."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    return "\n".join(lines + ["| " + " | ".join(str(r[k]) for k in keys) + " |" for r in rows])


def publish(name: str, rows: list[dict[str, object]], notes: str) -> None:
    """Print the table and write it, with where it ran, to benchmarks/results/NAME.{md,json}."""
    where = environment()
    text = "\n".join([table(rows), "", notes, "", *(f"- {k}: `{v}`" for k, v in where.items())])
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    result = {"environment": where, "notes": notes, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
