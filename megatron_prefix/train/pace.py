"""How far and how fast a run is: epoch, seconds, tokens a second, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_prefix.config import Config
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.steps.packed import PackedSteps
from megatron_prefix.platform.gpus import peak_of_device

MEASURED = (
    "wall_time_s",
    "memory_gib",
    "step_time_s",
    "pairs_per_second",
    "tokens_per_second",
    "tokens_per_second/logical",
    "mfu",
)
"""Values that differ between two runs of the same steps."""


class Pace:
    """The values that every training step logs about itself, from its seconds and counts."""

    def __init__(self, config: Config, sampler: Sampler, num_steps: int) -> None:
        self._started = time.monotonic()
        self._steps_per_epoch = steps_per_epoch(config, sampler, num_steps)
        self._peak = run_peak(config, sampler)

    def values(
        self, step: int, seconds: float, counts: Mapping[str, int], forward_flops: float
    ) -> dict[str, float]:
        """Of the step that ended as number `step`; `counts` has its tokens and pairs by name, and
        `forward_flops` are the operations of a forward pass over its rows."""
        mfu = {}
        if self._peak is not None:
            # backward counts as two forward passes; recomputation and reference are left out
            mfu = {"mfu": round(3 * forward_flops / (seconds * self._peak), 4)}
        return {
            "epoch": round(step / self._steps_per_epoch, 4),
            "wall_time_s": round(time.monotonic() - self._started, 3),
            "memory_gib": round(peak_memory() / 2**30, 3),
            "step_time_s": round(seconds, 4),
            "pairs_per_second": round(counts["num_pairs"] / seconds, 3),
            "tokens_per_second": round(counts["tokens/executed"] / seconds, 1),
            "tokens_per_second/logical": round(counts["tokens/logical"] / seconds, 1),
            **mfu,
        }


def run_peak(config: Config, sampler: Sampler) -> float | None:
    """Operations per second of all GPUs at their peak; None if it is not known, on CPU, and with
    adapters, whose backward pass has fewer operations."""
    if not torch.cuda.is_available() or config.lora is not None or sampler.cost is None:
        return None
    if config.model.dtype != "bfloat16":
        return None
    peak = peak_of_device(torch.cuda.get_device_name())
    return None if peak is None else peak * dist.get_world_size()


def steps_per_epoch(config: Config, sampler: Sampler, num_steps: int) -> float:
    """Steps of one pass over the training data: 1.5 with 6 groups in batches of 4."""
    if config.train.epochs is not None:
        return num_steps / config.train.epochs
    if config.data.global_batch_size is not None:
        return len(sampler.dataset) / config.data.global_batch_size
    composition, epochs = sampler.composition, 1
    if isinstance(composition, PackedSteps):  # it knows all of its epochs together
        epochs = composition.manifest["settings"]["epochs"]
    return composition.num_steps(epochs) / epochs


def peak_memory() -> int:
    """Bytes that this process has had at most: of the GPU if there is one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
