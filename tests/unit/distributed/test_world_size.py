"""Layouts that do not divide the processes are refused with both numbers."""

import pytest

from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed import world_faults

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
CONTEXT, EXPERTS = "context_parallel_size", "expert_model_parallel_size"


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        ({}, 1),
        ({}, 3),
        ({TENSOR: 2, PIPELINE: 2}, 8),
        ({TENSOR: 2, CONTEXT: 3}, 12),
        ({EXPERTS: 4}, 4),
        ({TENSOR: 2, EXPERTS: 2}, 4),
        ({CONTEXT: 2, EXPERTS: 2}, 2),  # experts are shared among context-parallel ranks too
    ],
)
def test_layouts_that_fit(sizes, world_size):
    assert list(world_faults(ParallelConfig(**sizes), world_size)) == []


def test_the_product_has_to_divide_the_processes():
    (fault,) = world_faults(ParallelConfig(**{TENSOR: 2, PIPELINE: 2, CONTEXT: 3}), 18)
    assert fault == (
        "18 processes were started, and parallel.tensor_model_parallel_size = 2 x "
        "parallel.pipeline_model_parallel_size = 2 x parallel.context_parallel_size = 3 asks for a "
        "multiple of 12"
    )


def test_experts_need_ranks_to_share_them():
    (fault,) = world_faults(ParallelConfig(**{TENSOR: 2, EXPERTS: 4}), 4)
    assert "4 processes were started" in fault and "expert_model_parallel_size = 4" in fault
    assert "with 2 processes for each of them it asks for a multiple of 8" in fault
