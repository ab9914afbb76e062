"""Rows under TRL's names: the documented example, TRL's own rows, and refused arguments."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import megatron_prefix as mp
from megatron_prefix.attention.plan import build_path_plan

SHARED = ("input_ids", "position_ids", "shift_labels", "tree_kv_index", "tree_cu_seqlens_q")
SHARED += ("tree_cu_seqlens_k", "tree_max_seqlens", "token_index", "segment_id")
OWN = ("tree_parents", "pairs")


def test_the_example_of_the_module():
    lists, masks = [[5, 6, 7, 8], [5, 6, 9]], [[0, 0, 1, 1], [0, 0, 1]]
    row = mp.tree_rows(lists, [(0, 1)], completion_masks=masks)
    assert {name: x.tolist() for name, x in row.items()} == {
        "input_ids": [5, 6, 7, 8, 6, 9],
        "position_ids": [0, 1, 2, 3, 1, 2],
        "shift_labels": [-100, 7, 8, -100, 9, -100],
        "tree_kv_index": [0, 0, 1, 2, 3, 0, 4, 5],
        "tree_cu_seqlens_q": [0, 1, 4, 6],
        "tree_cu_seqlens_k": [0, 1, 5, 8],
        "tree_max_seqlens": [3, 4],
        "token_index": [1, 2, 4],
        "segment_id": [0, 0, 1],
        "tree_parents": [-1, 0, 0],
        "pairs": [[0, 1]],
    }


def random_samples(seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token lists of two letters and their masks: they share beginnings of every length, some are
    equal, one begins another, and some have one token. Masks are often several runs."""
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 2, rng.integers(1, 12)).tolist() for _ in range(rng.integers(1, 14))]
    lists += [lists[0], [*lists[0], 1, 0]]
    return lists, [rng.integers(0, 2, len(x)).tolist() for x in lists]


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install trl")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(30))
def test_rows_are_those_of_trl(seed):
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    lists, masks = random_samples(seed)
    theirs = packing.TreeRow()
    for tokens, mask in zip(lists, masks, strict=True):
        theirs.add(
            {
                "input_ids": torch.tensor(tokens),
                "completion_mask": torch.tensor(mask),
                "old_log_probs": torch.zeros(len(tokens)),
                "advantage": 0.0,
                "group_id": 0,
            }
        )
    expected = theirs.pack()
    row = mp.tree_rows(lists, [], completion_masks=masks)
    assert set(row) == {*SHARED, *OWN}
    assert set(expected) - set(row) == {"old_log_probs", "advantages"}
    for name in SHARED:
        assert row[name].dtype == expected[name].dtype, name
        assert torch.equal(row[name], expected[name]), name


@pytest.mark.parametrize("seed", range(5))
def test_the_layout_has_the_same_paths_as_the_attention_plan(seed):
    lists, masks = random_samples(seed)
    row = mp.tree_rows(lists, [], completion_masks=masks)
    layout = mp.TreeLayout.from_parents(row["tree_cu_seqlens_q"].diff(), row["tree_parents"])
    assert layout.position_ids().tolist() == row["position_ids"].tolist()
    starts = row["tree_cu_seqlens_k"].tolist()
    paths = [row["tree_kv_index"][a:b] for a, b in zip(starts, starts[1:], strict=False)]
    plan = build_path_plan(layout, "cpu")  # one piece per leaf
    leaves = [path for path, is_leaf in zip(paths, layout.leaf_mask, strict=True) if is_leaf]
    assert torch.equal(torch.cat(leaves), plan.kv_index)


@pytest.mark.parametrize(
    ("lists", "pairs", "masks", "message"),
    [
        ([], [], [], "0 token lists"),
        ([[1]], [], [], "1 token lists and 0 completion masks"),
        ([[1, 2]], [], [[1]], r"token list 0 has shape \(2,\)"),
        ([[1], []], [], [[1], []], "token list 1 has shape"),
        ([[1, -1]], [], [[0, 1]], "token list 0 has tokens from -1 to 1"),
        ([[1], [2]], [(0, 2)], [[1], [1]], r"pair \(0, 2\)"),
        ([[1], [2]], [(1, 1)], [[1], [1]], r"pair \(1, 1\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(lists, pairs, masks, message):
    with pytest.raises(ValueError, match=message):
        mp.tree_rows(lists, pairs, completion_masks=masks)
