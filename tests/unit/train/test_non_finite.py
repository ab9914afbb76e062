"""Rows whose sums are not finite: which they are, their message and their file."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_prefix.data.steps.collate import RowItem, collate_packed
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.tree import build_tree
from megatron_prefix.testing import random_group
from megatron_prefix.train.non_finite import describe, file_name, finite_rows, save_rows


def row_of(*groups: int):
    """A row with these groups."""
    items = []
    for group in groups:
        tree = build_tree(*random_group(np.random.default_rng(group)))
        weights = np.ones(tree.num_pairs)
        items.append(RowItem(group=group, view=view(tree, "tree", 0), pair_weights=weights))
    return collate_packed(items, 4)


def log_of(loss: float, rewards: float) -> dict:
    return {"loss": torch.tensor(loss), "sums": {"rewards": torch.tensor([rewards, 1.0])}}


def test_a_row_is_finite_if_every_sum_is():
    logs = [
        log_of(loss=1.0, rewards=2.0),
        log_of(loss=float("nan"), rewards=2.0),
        log_of(loss=1.0, rewards=float("inf")),
    ]
    assert finite_rows(logs) == [True, False, False]


def test_the_message_has_the_groups_of_the_other_rows():
    rows = [row_of(3), row_of(7, 5), row_of(2)]
    assert describe(1, rows, [True, False, True]) == ["rank 1 row 1 (groups 5, 7)"]
    assert describe(0, rows, [True] * 3) == []


@pytest.mark.parametrize("has_reference", [True, False])
def test_the_file_has_all_that_makes_a_row(tmp_path, has_reference):
    rows = [row_of(3), row_of(7, 5)]
    ref_logps = [torch.arange(float(row.num_responses)) if has_reference else None for row in rows]
    batches = [SimpleNamespace(ref_logps=x, references=None) for x in ref_logps]
    path = save_rows(str(tmp_path), 12, 1, rows, batches)
    assert path == tmp_path / file_name(12, 1) == tmp_path / "nonfinite-step0000012-rank1.npz"
    with np.load(path, allow_pickle=False) as saved:
        assert saved["step"] == 12
        for i, row in enumerate(rows):
            assert np.array_equal(saved[f"row{i}_tokens"], row.tokens)
            assert np.array_equal(saved[f"row{i}_parents"], row.layout.parents)
            assert np.array_equal(saved[f"row{i}_source_row"], row.logit_token)
            assert np.array_equal(saved[f"row{i}_pair_weights"], row.pair_weights)
            assert (f"row{i}_ref_logps" in saved) == has_reference
            if has_reference:
                assert np.array_equal(saved[f"row{i}_ref_logps"], ref_logps[i].numpy())
