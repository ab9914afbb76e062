"""The benchmark of pairs about pictures runs, and its modes encode what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_it_prints_what_sharing_saves(tmp_path):
    """In a copy of the tools, so that no result in the repository is replaced."""
    copy = tmp_path / "tools"
    copy.mkdir()
    for file in (ROOT / "tools").glob("bench_*.py"):
        (copy / file.name).write_text(file.read_text())
    command = [sys.executable, str(copy / "bench_images.py"), "--models", "LLaVA-1.5"]
    done = subprocess.run(
        [*command, "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| LLaVA-1.5")]
    summary = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    # 606 tokens of prompt and 2 x 90 of responses: less than the 2 x 696 of two sequences
    assert 1.6 < float(summary[3]) < 1.9
    assert (tmp_path / "benchmarks" / "results" / "images_cpu.json").is_file()
