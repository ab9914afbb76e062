"""The loop's own arithmetic: lengths of pairs, and when something is due. Runs: tests/numerics."""

from types import SimpleNamespace

import numpy as np

from megatron_prefix.train.logical import pair_lengths
from megatron_prefix.train.trainer import _is_due


def test_both_sides_of_a_pair_have_their_whole_prompt():
    dataset = SimpleNamespace(
        group_pairs=np.array([0, 1, 3]),
        group_responses=np.array([0, 2, 5]),
        pair_responses=np.array([[0, 1], [0, 2], [1, 2]]),
        response_lengths=np.array([9, 8, 7, 6, 5]),
    )
    assert pair_lengths(dataset, 0).tolist() == [[9, 8]]
    assert pair_lengths(dataset, 1).tolist() == [[7, 5], [6, 5]]


def test_an_interval_is_due_at_its_multiples():
    assert [step for step in range(1, 10) if _is_due(step, 3)] == [3, 6, 9]
    assert not any(_is_due(step, None) for step in range(1, 10))
