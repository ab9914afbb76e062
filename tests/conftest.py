"""Fixtures for all tests."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real preference sets; tests that need them are skipped if they are absent."""
    path = Path(os.environ.get("MEGATRON_PREFIX_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "hh_pairs.jsonl.gz").is_file():
        pytest.skip(f"no real preference data in {path}: set MEGATRON_PREFIX_DATA")
    return path


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """SIGINT as a terminal delivers it; a shell starts background jobs with it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
