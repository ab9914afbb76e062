"""Time of a run: its steps, tokens per second, hours, and what sharing saves of them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from megatron_prefix.config import ParallelConfig
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.step_time import Job, StepWork, step_time, utilisation


def step_work(data: dict[str, Any], mode: str, own_mode: str, parallel: ParallelConfig) -> StepWork:
    """The work of a step under the sharing mode `mode`.

    `data` is the part of the plan about the data. Its rows are those of `own_mode`: padding and
    rows of another mode are taken in proportion to tokens, and spread over the ranks as well.
    """
    cost, own = data["sharing"][mode], data["sharing"][own_mode]
    ratio = cost["tokens"] / own["tokens"]
    padding = data["executed_tokens_per_step"] / own["tokens"]
    parts = cost["forward_parts"]
    # 5 rows per rank for 1000 tokens and stages that take rows in multiples of 4: 1500 tokens in
    # another mode need 7.5 rows, so 8
    multiple = parallel.count_multiple
    rows = math.ceil(data["rows_per_rank"] * ratio / multiple) * multiple
    return StepWork(
        flops=ForwardFlops(
            linear=parts["linear"] * padding,
            attention=parts["attention"],
            head=parts["head"],
            adapters=parts["adapters"] * padding,
            tower=parts["tower"],
            projector=parts["projector"],
        ),
        tokens=data["executed_tokens_per_step"] * ratio,
        rows=rows if mode != own_mode else data["rows_per_rank"],
        busy_ranks=data["busy_ranks"],
    )


def run_time(job: Job, parallel: ParallelConfig, data: dict[str, Any], mode: str) -> dict[str, Any]:
    """Steps, time and cost of the run under its sharing mode `mode`, against none."""
    work = step_work(data, mode, mode, parallel)
    time = step_time(job, parallel, work)
    hours = data["num_steps"] * time.total / 3600
    return {
        "gpu": job.gpu.name,
        "mfu": job.mfu,
        "steps": data["num_steps"],
        "seconds_per_step": time.total,
        "seconds": asdict(time),
        "tokens_per_second": work.tokens / time.total,
        "logical_tokens_per_second": data["sharing"]["none"]["tokens"] / time.total,
        "step_mfu": utilisation(job, work, time.total),
        "hours": hours,
        "gpu_hours": hours * job.world_size,
        "sharing": _sharing(job, parallel, data, mode),
    }


def _sharing(job: Job, parallel: ParallelConfig, data: dict[str, Any], mode: str) -> dict[str, Any]:
    """Hours with sharing and without; if the run shares nothing, with `tree`."""
    shared = "tree" if mode == "none" else mode
    with_it, without = (
        data["num_steps"]
        * step_time(job, parallel, step_work(data, which, mode, parallel)).total
        / 3600
        for which in (shared, "none")
    )
    saved = without - with_it
    return {
        "mode": shared,
        "is_on": mode != "none",
        "hours": with_it,
        "hours_without": without,
        "saved_hours": saved,
        "saved_gpu_hours": saved * job.world_size,
        "saved_share": saved / without,
    }
