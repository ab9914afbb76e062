"""The toy set, built, for tests of whole commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_prefix.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def make_toy(directory: Path) -> str:
    tool = ROOT / "tools" / "make_toy_preferences.py"
    command = [sys.executable, tool, "--output", directory, "--num-train", "40", "--num-valid", "8"]
    subprocess.run(command, check=True, capture_output=True)
    prefix = str(directory / "train")
    toy = ["--input", f"{directory}/train.jsonl", "--tokenizer", "bytes", "--output", prefix]
    assert main(["build", *toy]) == 0
    return prefix
