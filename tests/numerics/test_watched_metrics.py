"""Watched metrics do not depend on sharing or packing: every layout of rows logs the same."""

from __future__ import annotations

import pytest
from ranked_sets import write_ranked_set
from small_runs import configure, trained

LAYOUTS = {
    "tree": {},
    "response": {"sharing": "response", "row_capacity": 400},
    "none": {"sharing": "none"},
    "unpacked": {"sharing": "none", "packing": False, "micro_batch_size": 2},
}
KEYS = ("kl", "logratios/chosen", "logratios/rejected", "rewards/length_correlation")
KINDS = ("chosen_longer", "similar_length", "chosen_shorter")
KINDS += ("low_margin", "middle_margin", "high_margin")
LOSS = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("watched")
    data, valid = (write_ranked_set(folder / x, i, 8) for i, x in enumerate(("train", "valid")))
    train = {"steps": 3, "eval_interval": 2}
    return {
        name: trained(
            configure(folder / name, data, data={"valid": valid, **own}, loss=LOSS, train=train)
        )
        for name, own in LAYOUTS.items()
    }


@pytest.mark.parametrize("name", [x for x in LAYOUTS if x != "tree"])
def test_every_layout_logs_the_same(runs, name):
    assert len(runs[name]) == len(runs["tree"])
    for ours, theirs in zip(runs[name], runs["tree"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            if key.removeprefix("eval_") in KEYS or "/accuracies/" in key or "loss/" in key:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_what_is_logged(runs):
    """Nothing of length before the first update, when all rewards are equal."""
    steps = [row for row in runs["tree"] if "loss" in row]
    assert all({*KEYS[:3], "loss/sigmoid", "loss/sft"} <= row.keys() for row in steps)
    assert [KEYS[3] in row for row in steps] == [False, True, True]
    evaluations = [row for row in runs["tree"] if "eval_loss" in row]
    assert len(evaluations) == 3
    for row in evaluations:
        assert {f"eval_rewards/accuracies/{kind}" for kind in KINDS} <= row.keys()
        assert f"eval_{KEYS[0]}" in row
    assert evaluations[0]["eval_kl"] == 0 and evaluations[-1]["eval_kl"] != 0
    assert len({evaluations[-1][f"eval_rewards/accuracies/{kind}"] for kind in KINDS}) > 2
