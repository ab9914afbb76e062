"""What several unit tests need: process groups of one process."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(scope="module")
def world():
    """This process alone, as `train` joins it; for tests that hold a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_prefix.config import ParallelConfig
        from megatron_prefix.distributed import join_world
    with join_world(ParallelConfig(), seed=0) as world:
        yield world
