"""Whether a layout divides the number of processes; needs neither torch nor Megatron-Core."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_prefix.config import ParallelConfig
from megatron_prefix.text import counted


def world_faults(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """Why `world_size` processes cannot be laid out as `parallel` asks, if they cannot."""
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {key: getattr(parallel, key) for key in keys}
    model_size = math.prod(sizes.values())
    started = f"{counted(world_size, 'process')} {'was' if world_size == 1 else 'were'} started"
    if world_size % model_size:
        named = " x ".join(f"parallel.{key} = {value}" for key, value in sizes.items())
        yield f"{started}, and {named} asks for a multiple of {model_size}"
        return
    experts = parallel.expert_model_parallel_size
    stages = model_size // parallel.context_parallel_size
    if world_size % (stages * experts):
        yield (
            f"{started}, and parallel.expert_model_parallel_size = {experts} shares experts among "
            f"the data- and context-parallel ranks: with {stages} processes for each of them it "
            f"asks for a multiple of {stages * experts}"
        )
