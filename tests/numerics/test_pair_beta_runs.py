"""Whole runs in which pairs have a beta of their own: in every layout the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranked_sets import write_ranked_set
from small_runs import configure, lines, trained

from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.objectives.pairwise import dpo_loss

BATCHES = {"global_batch_size": 4, "seed": 3}
LAYOUTS = {
    "tree": {"row_capacity": 200},
    "split": {"row_capacity": 44, "oversized": "split"},
    "pair": {"sharing": "pair", "row_capacity": 200},
    "unpacked": {
        **{"sharing": "none", "packing": False, "row_capacity": None, "micro_batch_size": 4}
    },
}
LOSSES = {
    "sigmoid": {"loss_type": "sigmoid", "pair_beta": True, "comparisons": "best_vs_rest"},
    "list": {"loss_type": ["ipo", "sft"], "loss_weights": [0.1, 1.0], "pair_beta": True},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_ranked_set(tmp_path_factory.mktemp("betas") / "set", 2, 10, betas=True)


def run(folder, dataset: str, loss: dict, layout: str) -> list[dict]:
    config = configure(
        folder / layout,
        dataset,
        data={"valid": dataset, **BATCHES, **LAYOUTS[layout]},
        loss=loss,
        train={"steps": 4},
    )
    trained(config)
    return lines(folder / layout)


@pytest.mark.parametrize("name", LOSSES)
def test_layouts_follow_one_trajectory(dataset, tmp_path, name):
    layouts = LAYOUTS if name == "sigmoid" else ("split", "unpacked")
    runs = [run(tmp_path, dataset, LOSSES[name], layout) for layout in layouts]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            for key in ("loss", "grad_norm", "eval_loss"):
                if key in b:
                    assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
            for key in ("rewards/chosen", "eval_rewards/margins"):
                if key in b:
                    assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    without = run(tmp_path / "off", dataset, {**LOSSES[name], "pair_beta": False}, "tree")
    difference = abs(without[-1]["eval_loss"] / runs[0][-1]["eval_loss"] - 1)
    assert difference > 1e-3, "the betas of pairs change nothing"


def test_the_evaluation_is_that_of_the_data(dataset, tmp_path):
    """The loss over all pairs, from their log-probabilities and the betas in the columns."""
    data = PreferenceDataset(dataset)
    assert 0 < np.isnan(data.pair_betas).sum() < len(data.pair_betas)
    rows = run(tmp_path, dataset, {"pair_beta": True, "beta": 0.3}, "tree")
    last = rows[-1]
    betas = torch.from_numpy(np.array(data.pair_betas))
    betas = betas.where(~betas.isnan(), 0.3)
    zero = torch.zeros(len(betas)).double()
    assert float(dpo_loss(zero, zero, zero, zero, beta=betas).losses.mean()) == pytest.approx(
        rows[0]["eval_loss"], rel=1e-6
    )
    assert last["eval_loss"] < 0.98 * rows[0]["eval_loss"]


def test_data_without_betas_is_refused(tmp_path):
    plain = write_ranked_set(tmp_path / "plain", 2, 6)
    config = configure(tmp_path / "run", plain, loss={"pair_beta": True})
    with pytest.raises(InputError, match=r"pair_beta: true: no pair in data.train = .* has a beta"):
        trained(config)
    off = replace(config, loss=replace(config.loss, pair_beta=False))
    assert trained(replace(off, train=replace(off.train, steps=1)))
