"""The report before a run: fill of the rows, and balance of the ranks."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from megatron_prefix.train.steps_report import MOST_STEPS, describe_steps


class Steps:
    """A sampler with two rows of 30 and 60 tokens per step, and an empty one."""

    composition = None
    micro_batch_size = None
    oversized = "error"

    def __init__(self, row_capacity: int | None = 100, num_ranks: int = 1) -> None:
        self.row_capacity, self.num_ranks, self.asked = row_capacity, num_ranks, []

    def step(self, number: int):
        self.asked.append(number)
        full, half = SimpleNamespace(num_tokens=30), SimpleNamespace(num_tokens=60)
        return SimpleNamespace(
            rows=[[[full], []], [[half]]],
            costs=[1.0, 3.0],
            repeated_tokens=18,
            is_divided=number > 0,
        )


def test_repeated_tokens_are_reported_with_split():
    split = Steps()
    split.oversized = "split"
    assert describe_steps(split, 5).endswith(
        ", 18.0 tokens per step repeated by data.oversized: split (20.0 %; parts in 4 of 5 steps)"
    )


def test_fill_counts_the_rows_that_hold_something():
    assert describe_steps(Steps(), 5) == (
        "steps: 5, 2.0 rows per step, fill 45.0 %, 55.0 % of the capacity unused"
    )


def test_the_busiest_rank_is_compared_with_the_mean():
    text = describe_steps(Steps(num_ranks=2), 5)
    assert text.endswith(", work of the busiest of 2 ranks over the mean 1.500")


def test_padded_rows_have_no_fill():
    sampler = Steps()
    sampler.micro_batch_size = 4
    assert describe_steps(sampler, 5) == "steps: 5, 2.0 rows per step"


@pytest.mark.parametrize("num_steps", [MOST_STEPS, 10_000])
def test_steps_are_read_evenly_over_the_run(num_steps):
    sampler = Steps()
    text = describe_steps(sampler, num_steps)
    assert len(sampler.asked) == MOST_STEPS
    assert (sampler.asked[0], sampler.asked[-1]) == (0, num_steps - 1)
    assert bool(re.search(rf"\(measured on {MOST_STEPS} of the steps\)", text)) == (
        num_steps > MOST_STEPS
    )
