"""Fixtures of the GPU tests."""

import pytest
import torch

from megatron_prefix.attention.flex import compiled


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    """No test of `flex` finds another's compiled graphs, which torch counts."""
    callspec = getattr(request.node, "callspec", None)
    is_flex = callspec is not None and callspec.params.get("backend") == "flex"
    yield
    if is_flex:
        compiled.cache_clear()
        torch._dynamo.reset()


@pytest.fixture
def here():
    """Process groups for a test that holds a model; `train` makes its own."""
    from megatron_prefix.config import ParallelConfig
    from megatron_prefix.train.parallel import world

    with world(ParallelConfig(), seed=0) as here:
        yield here
