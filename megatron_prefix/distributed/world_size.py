"""Whether a layout divides the number of processes; needs neither torch nor Megatron-Core."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_prefix.config import ParallelConfig


def world_faults(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """Why `world_size` processes cannot be laid out as `parallel` asks, if they cannot."""
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {key: getattr(parallel, key) for key in keys}
    model_size = math.prod(sizes.values())
    if world_size % model_size:
        named = " x ".join(f"parallel.{key} = {value}" for key, value in sizes.items())
        yield (
            f"{world_size} processes were started, and {named} asks for a multiple of {model_size}"
        )
        return
    experts = parallel.expert_model_parallel_size
    stages = model_size // parallel.context_parallel_size
    if world_size % (stages * experts):
        yield (
            f"{world_size} processes were started, and parallel.expert_model_parallel_size = "
            f"{experts} shares experts among the data- and context-parallel ranks: with {stages} "
            f"processes for each of them it asks for a multiple of {stages * experts}"
        )
