"""Process groups of a run, made for its length and taken down behind it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from megatron_prefix import platform
from megatron_prefix.config import ParallelConfig
from megatron_prefix.errors import InputError


@dataclass(frozen=True)
class World:
    """This process's place: `groups` for Megatron-Core, `device` to compute on."""

    groups: ProcessGroupCollection
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return dist.get_rank() == 0


@contextlib.contextmanager
def world(parallel: ParallelConfig, seed: int) -> Iterator[World]:
    """Join the processes that `torchrun` started, or stand alone, for as long as the context.

    On CPU Megatron-Core is adapted meanwhile (see platform.py). Raises InputError where more
    processes were started than the configuration lays out.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise InputError(
            f"{size} processes were started, and this version trains in one: start without "
            "torchrun, or with --nproc-per-node=1"
        )
    with platform.adapted():
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
            if on_cuda:
                model_parallel_cuda_manual_seed(seed)
            else:
                initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            yield World(groups, platform.device())
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
