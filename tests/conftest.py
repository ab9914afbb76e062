"""Fixtures for all tests."""

import gc
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MORE_THREADS = 100


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


@pytest.fixture(scope="session")
def threads_left() -> dict[str, int]:
    """`count`: threads after the last collection; fixtures of modules keep some."""
    return {"count": 0}


@pytest.fixture(autouse=True)
def process_groups_end_with_their_test(threads_left):
    """Megatron-Core's data-parallel wrapper refers to itself, so a run's process groups, with some
    50 threads of gloo, live until the collector finds them. A collection takes half a second: one
    per hundred new threads, not one per test while something keeps them."""
    yield
    if len(os.listdir("/proc/self/task")) > threads_left["count"] + MORE_THREADS:
        gc.collect()
        threads_left["count"] = len(os.listdir("/proc/self/task"))
