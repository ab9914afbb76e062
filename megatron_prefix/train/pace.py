"""How far and how fast a run is: epoch, seconds, tokens a second, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch

from megatron_prefix.config import Config
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.steps.packed import PackedSteps

MEASURED = (
    "wall_time_s",
    "memory_gib",
    "step_time_s",
    "pairs_per_second",
    "tokens_per_second",
    "tokens_per_second/logical",
)
"""Values that differ between two runs of the same steps."""


class Pace:
    """The values that every training step logs about itself, from its seconds and counts."""

    def __init__(self, config: Config, sampler: Sampler, num_steps: int) -> None:
        self._started = time.monotonic()
        self._steps_per_epoch = steps_per_epoch(config, sampler, num_steps)

    def values(self, step: int, seconds: float, counts: Mapping[str, int]) -> dict[str, float]:
        """Of the step that ended as number `step`; `counts` has its tokens and pairs by name."""
        return {
            "epoch": round(step / self._steps_per_epoch, 4),
            "wall_time_s": round(time.monotonic() - self._started, 3),
            "memory_gib": round(peak_memory() / 2**30, 3),
            "step_time_s": round(seconds, 4),
            "pairs_per_second": round(counts["num_pairs"] / seconds, 3),
            "tokens_per_second": round(counts["tokens/executed"] / seconds, 1),
            "tokens_per_second/logical": round(counts["tokens/logical"] / seconds, 1),
        }


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
