"""Runs with mixtures of experts in one process: how responses lie in rows changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import configure, saved_weights, trained

from megatron_prefix.config import load_config

EXPERTS = {"num_moe_experts": 5, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
LAYOUTS = {
    "tree": {"row_capacity": 2048},
    "none": {"sharing": "none", "row_capacity": 2048},
    "unpacked": {
        **{"sharing": "none", "packing": False},
        **{"micro_batch_size": 4, "row_capacity": None},
    },
}


@pytest.mark.parametrize("name", ["none", "unpacked"])
def test_packing_and_sharing_change_nothing(few_hh, tmp_path, name):
    """Without auxiliary loss, five steps."""
    runs = {}
    for layout in ("tree", name):
        saved = str(tmp_path / layout / "saved")
        config = configure(
            tmp_path / layout,
            few_hh,
            data=LAYOUTS[layout],
            model=EXPERTS,
            train={"steps": 5, "save": saved},
        )
        runs[layout] = trained(config), saved_weights(saved, 5)
    (ours, weights), (theirs, expected) = runs[name], runs["tree"]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], rel=1e-3, abs=1e-5)
        assert "moe/aux_loss" not in a
    assert ours[-1]["tokens/executed"] > 1.2 * theirs[-1]["tokens/executed"]
    for key, weight in expected.items():
        assert (weights[key] - weight).abs().max() <= 1e-4, key


def test_the_auxiliary_loss_spreads_tokens(few_hh, tmp_path):
    ends = {}
    for coefficient in (0.01, 1.0):
        model = {**EXPERTS, "init_method_std": 0.1, "moe_aux_loss_coeff": coefficient}
        config = configure(tmp_path / str(coefficient), few_hh, model=model)
        ends[coefficient] = [row["moe/aux_loss"] for row in trained(config)]
    assert ends[0.01][0] == ends[1.0][0] > 1.0
    assert ends[1.0][-1] < ends[0.01][-1]


def test_the_example_runs(random_set, tmp_path):
    example = Path(__file__).resolve().parents[2] / "examples" / "moe" / "dpo.yaml"
    changes = [f"data.train={random_set}", "data.valid=null", "train.eval_interval=null"]
    changes += ["train.steps=6", f"logging.output={tmp_path}"]
    rows = trained(load_config(example, changes))
    assert len(rows) == 6 and all(row["moe/aux_loss"] > 0.99 for row in rows)
