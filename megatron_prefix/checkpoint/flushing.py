"""Flush files and folders to the disk, so that a power cut cannot undo what follows."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until the disk has a file's contents, or a folder's entries. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(root: Path) -> None:
    """Wait until the disk has a folder and everything below it. Raises OSError."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            flush(Path(folder, name))
        flush(Path(folder))
