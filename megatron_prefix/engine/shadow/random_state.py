"""The state of random numbers, put back after computations that must leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's generators of the CPU and of `device`, and Megatron-Core's, at the end."""
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    tracker.set_states(states)
