"""Heads of pairs: the targets of each side's first tokens, on one rank or spread over several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import build_tree
from megatron_prefix.engine.batch import pair_heads, to_device
from megatron_prefix.engine.step import response_scores
from megatron_prefix.objectives import ScoreParts
from megatron_prefix.testing import random_group

CPU = torch.device("cpu")


def row(seed: int):
    rng = np.random.default_rng(seed)
    views = [view(build_tree(*random_group(rng)), "tree", 0) for _ in range(3)]
    items = [
        RowItem(group=i, view=v, pair_weights=np.ones(len(v.pairs))) for i, v in enumerate(views)
    ]
    return collate_packed(items, 8)


def targets_of(batch, response: int) -> np.ndarray:
    """A response's targets in the order of its tokens."""
    return np.flatnonzero(batch.response == response)


@pytest.mark.parametrize("seed", range(4))
def test_heads_are_the_first_tokens_of_both_sides(seed):
    batch = row(seed)
    logps = -torch.rand(len(batch.response), dtype=torch.float64)
    device_row = to_device(batch, CPU, parts=ScoreParts(heads=True))
    vector = response_scores(logps, device_row)
    assert device_row.num_scores == len(vector)
    scores, heads, _ = device_row.parts.split(vector, batch.num_responses)
    assert heads.shape == (len(batch.pairs), 2)
    for pair, result in zip(batch.pairs, heads, strict=True):
        sides = [targets_of(batch, r) for r in pair]
        shorter = min(map(len, sides))
        expected = [float(logps[side[:shorter]].sum()) for side in sides]
        assert result.tolist() == pytest.approx(expected, rel=1e-12)
        whole = [float(logps[side].sum()) for side in sides]
        assert scores[torch.from_numpy(pair)].tolist() == pytest.approx(whole, rel=1e-12)
        assert any(a == pytest.approx(b) for a, b in zip(expected, whole, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_share_a_row_have_parts_of_each_head(seed):
    batch = row(seed)
    logps = np.random.default_rng(seed).normal(size=len(batch.response))
    owner = np.random.default_rng(seed + 9).integers(0, 3, len(logps))
    total = np.zeros(2 * len(batch.pairs))
    for rank in range(3):
        is_own = owner == rank
        order = np.argsort(batch.response[is_own], kind="stable")
        own, offsets = pair_heads(batch, is_own, order)
        values = logps[is_own][own]
        total += [values[a:b].sum() for a, b in zip(offsets, offsets[1:], strict=False)]
    everything = np.ones(len(logps), bool)
    whole, offsets = pair_heads(batch, everything, np.argsort(batch.response, kind="stable"))
    expected = [logps[whole][a:b].sum() for a, b in zip(offsets, offsets[1:], strict=False)]
    assert total == pytest.approx(np.array(expected), rel=1e-12, abs=1e-12)
