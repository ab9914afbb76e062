"""Advice on a run, each line with its numbers, from what its plan says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_prefix.config import Config, ParallelConfig

MOST_BUBBLE = 0.1
"""Waiting over computing time of the stages, above which the batch is called too small."""
LEAST_FILL = 0.7
"""Tokens of the mean row over the capacity, below which rows are called short."""


def batch_advice(config: Config, data: dict[str, Any], bubble: float, ranks: int) -> Iterator[str]:
    """A batch that leaves pipeline stages or ranks without work."""
    parallel, groups = config.parallel, data["groups_per_step"]
    if groups < ranks:
        yield (
            f"{groups:,.0f} groups per step for {ranks} data-parallel ranks: {ranks - groups:,.0f} "
            "of them have nothing to do; raise the batch, or use fewer processes"
        )
    elif bubble > MOST_BUBBLE:
        rows, needed = data["rows_per_rank"], rows_for_bubble(parallel, MOST_BUBBLE)
        batch = config.data.global_batch_size
        name = "rows_per_step" if batch is None else "global_batch_size"
        now = config.data.rows_per_step if batch is None else batch
        assert now is not None, "one of both is set"
        yield (
            f"the batch is small for the pipeline: {rows} rows per rank leave a bubble of "
            f"{100 * bubble:.0f} %; {needed} rows per rank ({100 * MOST_BUBBLE:.0f} %) need about "
            f"data.{name} = {math.ceil(now * needed / rows):,}"
        )


def rows_for_bubble(parallel: ParallelConfig, bubble: float) -> int:
    """The least rows per rank whose pipeline bubble is not above `bubble`."""
    # 4 stages of 5 chunks: (4 - 1) / (5 x 0.1) = 6 rows, and as a multiple of 4 stages 8
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    rows = (parallel.pipeline_model_parallel_size - 1) / (chunks * bubble)
    multiple = parallel.count_multiple
    return math.ceil(round(rows / multiple, 6)) * multiple


def fill_advice(config: Config, data: dict[str, Any]) -> Iterator[str]:
    """Packed rows that leave much of their capacity empty."""
    capacity = config.data.row_capacity
    if not config.data.packing or capacity is None:
        return
    mean, longest = data["tokens_per_row"], data["longest_row"]
    if mean < LEAST_FILL * capacity:
        lower = "lower data.row_capacity to the longest row"
        if longest >= capacity:  # several groups fill it
            lower = "lower data.row_capacity, down to the tokens of the largest group"
        yield (
            f"rows have {mean:,.0f} of {capacity:,} tokens ({100 * mean / capacity:.0f} %), the "
            f"longest {longest:,}: memory is planned for the capacity; {lower}, or raise the batch "
            "for fuller rows"
        )


def recompute_advice(memory_gib: float, usable_gib: float, saved: float | None) -> Iterator[str]:
    """Recomputation that the memory does not ask for; `memory_gib` is what a rank needs without it,
    and `saved` the share of the step's time that goes with it."""
    if memory_gib > usable_gib:
        return
    gain = "" if saved is None else f", and a step takes {100 * saved:.0f} % less"
    yield (
        f"nothing needs to be recomputed: without it a rank needs {memory_gib:.1f} of "
        f"{usable_gib:.1f} GiB{gain}; remove model.recompute_granularity, …_method and …_num_layers"
    )


def reference_advice(config: Config, reference_gib: float, share: float | None) -> Iterator[str]:
    """A reference model in memory that `score` could replace; `share` is its part of the time."""
    passes = config.train.epochs or 1
    time = "" if share is None else f" and {100 * share:.0f} % of every step"
    again = "" if passes == 1 else f", and once instead of in each of {passes} epochs"
    yield (
        f"loss.reference: model takes {reference_gib:.1f} GiB of every rank{time}: run score "
        f"first, then loss.reference: precomputed needs none of it in training{again}"
    )
