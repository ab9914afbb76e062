"""Fixtures of the GPU tests."""

import sys

import pytest
import torch

from megatron_prefix.attention.backends.flex import compiled


def pytest_runtest_teardown(item, nextitem):
    """Behind the last case of a test, forget compiled graphs: torch counts them, for the process.

    Cases of one test share them, as compiling takes most of the time of a small one.
    """
    is_last = nextitem is None or nextitem.function is not item.function
    if is_last and "torch._dynamo" in sys.modules:
        compiled.cache_clear()
        torch._dynamo.reset()


@pytest.fixture
def world():
    """Process groups for a test that holds a model; `train` makes its own."""
    from megatron_prefix.config import ParallelConfig
    from megatron_prefix.distributed.world import join_world

    with join_world(ParallelConfig(), seed=0) as world:
        yield world
