"""The wheel has every file of the package, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "megatron_prefix"
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


def test_the_wheel_has_the_files_of_the_package(tmp_path):
    source = tmp_path / "source"  # pip leaves a build folder there
    shutil.copytree(ROOT / NAME, source / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    done = subprocess.run([*pip, str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {p for p in (ROOT / NAME).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert packed == {str(path.relative_to(ROOT)) for path in files}
