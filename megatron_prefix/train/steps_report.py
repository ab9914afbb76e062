"""Report of a run's steps before it begins: fill of the rows, balance of the ranks."""

from __future__ import annotations

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.steps.packed import PackedSteps, describe_packed_steps
from megatron_prefix.text import counted

MOST_STEPS = 32
"""Steps that are read, evenly over the run. A plan on disk has figures of all its steps."""


def describe_steps(sampler: Sampler, num_steps: int) -> str:
    """Fill of the rows, and the work of the busiest rank (as modelled) over the mean rank's.

    If there is a plan, the first line is that of `pack`, for all steps of the plan.
    """
    lines = []
    if isinstance(sampler.composition, PackedSteps):
        lines.append(describe_packed_steps(sampler.composition.manifest))
    chosen = np.unique(np.linspace(0, num_steps - 1, MOST_STEPS).astype(int)).tolist()
    tokens = rows = repeated = divided = 0
    unevenness = []
    for step in chosen:
        plan = sampler.step(step)
        filled = [row for share in plan.rows for row in share if row]
        tokens += sum(bundle.num_tokens for row in filled for bundle in row)
        rows += len(filled)
        repeated += plan.repeated_tokens
        divided += plan.is_divided
        unevenness.append(max(plan.costs) * len(plan.costs) / sum(plan.costs))
    text = f"steps: {num_steps:,}, {rows / len(chosen):.1f} rows per step"
    if sampler.row_capacity and not sampler.micro_batch_size:
        fill = 100 * tokens / (rows * sampler.row_capacity)
        text += f", fill {fill:.1f} %, {100 - fill:.1f} % of the capacity unused"
    if sampler.oversized == "split":
        text += (
            f", {repeated / len(chosen):,.1f} tokens per step repeated by data.oversized: split "
            f"({100 * repeated / tokens:.1f} %; parts in {divided} of "
            f"{counted(len(chosen), 'step')})"
        )
    if sampler.num_ranks > 1:
        text += (
            f", work of the busiest of {counted(sampler.num_ranks, 'rank')} over the mean "
            f"{np.mean(unevenness):.3f}"
        )
    if len(chosen) < num_steps:
        text += f" (measured on {len(chosen)} of the steps)"
    return "\n".join([*lines, text])


def large_batch_note(config: Config, num_groups: int) -> str | None:
    """A line if a step asks for more groups than the data has."""
    batch = config.data.global_batch_size
    if batch is None or batch <= num_groups:
        return None
    return (
        f"data.global_batch_size = {batch} and data.train has {counted(num_groups, 'group')}: "
        "every step is a whole epoch of them"
    )
