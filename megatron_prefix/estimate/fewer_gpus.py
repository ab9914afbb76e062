"""Whether fewer GPUs do the same: what `plan --search` says besides its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_prefix.config import Config
from megatron_prefix.estimate.layouts import divisors

MOST_TRIED = 3
"""Smaller numbers of GPUs that are searched."""
SAME_TIME = 1.05
"""A step that takes at most this many times as long counts as equally fast."""
MUCH_LOWER = 0.7
"""GPU-hours at most this share of those of all GPUs are worth a line."""


def fewer_gpus(
    world_size: int, seconds: float, seconds_on: Callable[[int], float | None]
) -> dict[str, Any] | None:
    """The fewest GPUs with equally fast steps, else those with much lower GPU-hours; None if there
    are neither.

    `seconds` is the time of a step on all of `world_size` GPUs, `seconds_on` that on fewer, or None
    if nothing fits them. Divisors of `world_size` are tried: of 12 these are 6, 4 and 3.
    """
    times: dict[int, float] = {}
    for count in divisors(world_size)[-2::-1][:MOST_TRIED]:
        own = seconds_on(count)
        if own is None:
            break  # still fewer have less memory in all
        times[count] = own
    equal = [count for count, own in times.items() if own <= SAME_TIME * seconds]
    if equal:
        count = min(equal)
    else:
        cheap = [n for n, own in times.items() if n * own <= MUCH_LOWER * world_size * seconds]
        if not cheap:
            return None
        count = min(cheap, key=lambda n: n * times[n])
    return {
        "world_size": count,
        "seconds_per_step": times[count],
        "of_the_time": times[count] / seconds,
        "of_the_gpu_hours": count * times[count] / (world_size * seconds),
    }


def fewer_line(world_size: int, fewer: dict[str, Any], config: Config) -> str:
    """The same in a line."""
    batch = "rows_per_step" if config.data.global_batch_size is None else "global_batch_size"
    return (
        f"the batch is small for {world_size} GPUs: on {fewer['world_size']} a step takes "
        f"{fewer['of_the_time']:.2f} x as long, for {100 * fewer['of_the_gpu_hours']:.0f} % of the "
        f"GPU-hours; take fewer, or raise data.{batch}"
    )
