"""Fixtures for all tests."""

import gc
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_THREADS = 150


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


@pytest.fixture(autouse=True)
def process_groups_end_with_their_test():
    """Megatron-Core's data-parallel wrapper refers to itself, so a run's process groups, with some
    50 threads of gloo, live until the collector finds them."""
    yield
    if len(os.listdir("/proc/self/task")) > MOST_THREADS:
        gc.collect()
