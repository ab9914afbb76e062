"""One objective of each unit in bfloat16, with recomputation: the first loss is accepted, and
packed trees follow the unpacked run and the run in float32 within the precision."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranked_sets import write_ranked_set
from small_runs import configure, trained

BFLOAT16 = {"dtype": "bfloat16", "recompute_granularity": "full", "recompute_method": "uniform"}
BFLOAT16 |= {"recompute_num_layers": 1}
UNPACKED = {"sharing": "none", "packing": False, "row_capacity": None, "micro_batch_size": 6}
SPLIT = {"oversized": "split", "row_capacity": 38}
REWARD = {"kind": "reward", "init_method_std": 0.05}
UNITS = {  # name: loss section, model section
    "pair": ({"loss_type": "apo_down", "weighting": "group"}, {}),
    "token": ({"loss_type": ["robust", "sft"], "label_smoothing": 0.1}, {}),
    "set": ({"loss_type": "plackett_luce"}, {}),
    "response": ({"loss_type": "regression"}, REWARD),
}
STEPS = 4
PRECISION = 2e-2
"""Relative; 2**-8 of log-probabilities of some 60 nats is 0.02 of a reward."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return write_ranked_set(tmp_path_factory.mktemp("ranked") / "set", 0, 10)


def losses(folder: Path, dataset: str, unit: str, data: dict, model: dict) -> list[float]:
    loss, kind = UNITS[unit]
    config = configure(
        folder, dataset, data=data, model={**kind, **model}, loss=loss, train={"steps": STEPS}
    )
    return [row["loss"] for row in trained(config)]


@pytest.mark.parametrize("unit", UNITS)
def test_bfloat16_follows_float32(dataset, tmp_path, unit):
    expected = losses(tmp_path / "float32", dataset, unit, {}, {})
    assert abs(expected[-1] / expected[0] - 1) > PRECISION, "nothing was learned"
    for name, data in (("tree", {}), ("split", SPLIT), ("unpacked", UNPACKED)):
        own = losses(tmp_path / name, dataset, unit, data, BFLOAT16)
        assert own != expected, "the precision changes nothing"
        assert own == pytest.approx(expected, rel=PRECISION), name
