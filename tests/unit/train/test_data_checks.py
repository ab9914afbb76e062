"""What a data set lacks of an objective's needs is named."""

import math

import pytest
from data_sets import path, write
from loss_tables import objective

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tree import Pair, build_tree
from megatron_prefix.errors import InputError
from megatron_prefix.train.data_checks import check_columns, run_sharing


def dataset(folder, scores, ranks, margins) -> PreferenceDataset:
    """Groups of two responses and one pair; None leaves a value out."""
    trees = []
    for score, rank, margin in zip(scores, ranks, margins, strict=True):
        paths = [
            path([1, 2 + i], 1, rank=rank + i if rank >= 0 else -1, score=s)
            for i, s in enumerate(score)
        ]
        trees.append(build_tree(paths, [Pair(chosen=0, rejected=1, margin=margin)]))
    write(folder / "set", trees, records=[3 * i for i in range(len(trees))])
    return PreferenceDataset(folder / "set")


NAN = math.nan
WHOLE = ([(1.0, 0.0)] * 3, [0] * 3, [0.5] * 3)
NO_SCORE = ([(1.0, 0.0), (1.0, NAN), (NAN, NAN)], [0] * 3, [0.5] * 3)
NO_RANK = ([(1.0, 0.0)] * 3, [0, -1, 0], [0.5] * 3)
NO_MARGIN = ([(1.0, 0.0)] * 3, [0] * 3, [0.5, NAN, NAN])


@pytest.mark.parametrize(
    ("kind", "loss", "lacking", "message"),
    [
        ("lm", {"margin": True}, NO_MARGIN, r"2 of the 3 pairs .* no margin .*group 1, record 3"),
        ("lm", {"margin": True}, NO_MARGIN, "but loss.margin: true needs one for each"),
        (
            "reward",
            {"loss_type": "scaled_bradley_terry"},
            NO_MARGIN,
            "but loss.loss_type: scaled_bradley_terry needs one for each",
        ),
        ("lm", {"loss_type": "rpo_sq"}, NO_SCORE, "2 of the 3 pairs .* response without a score"),
        (
            "lm",
            {"loss_type": "nca"},
            NO_SCORE,
            "3 of the 6 responses .* no score .first in group 1",
        ),
        ("lm", {"loss_type": "plackett_luce"}, NO_RANK, "2 of the 6 responses .* have no rank"),
        ("reward", {"loss_type": "infonca"}, NO_SCORE, "3 of the 6 responses .* no score"),
    ],
)
def test_what_is_missing_is_counted(tmp_path, kind, loss, lacking, message):
    own = objective(kind, **loss)
    check_columns(own, dataset(tmp_path / "whole", *WHOLE), "data.train")
    with pytest.raises(InputError, match=f"data.valid: .*{message}"):
        check_columns(own, dataset(tmp_path / "lacking", *lacking), "data.valid")


def test_regression_needs_a_score_somewhere(tmp_path):
    own = objective("reward", loss_type="regression")
    check_columns(own, dataset(tmp_path / "some", *NO_SCORE), "data.train")
    none = ([(NAN, NAN)] * 3, [0] * 3, [0.5] * 3)
    with pytest.raises(InputError, match="no response in .* has a score, but .* regression"):
        check_columns(own, dataset(tmp_path / "none", *none), "data.train")


def test_what_needs_pairs():
    assert not objective("reward", loss_type="regression").needs_pairs
    for loss in ({}, {"loss_type": "sft"}, {"loss_type": "plackett_luce"}):
        assert objective(**loss).needs_pairs


def test_sets_are_laid_out_whole():
    for sharing in ("tree", "pair", "response", "none"):
        assert run_sharing(objective(), sharing) == sharing
    own = objective(loss_type="infonca")
    assert [run_sharing(own, x) for x in ("tree", "response", "none")] == [
        *("tree", "response", "response")
    ]
    with pytest.raises(InputError, match="data.sharing = pair: loss.loss_type: infonca needs all"):
        run_sharing(own, "pair")
