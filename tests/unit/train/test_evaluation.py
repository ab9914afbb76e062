"""Metrics of held-out pairs from the scores of their responses, computed by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import tiny_config

from megatron_prefix.config import LossConfig
from megatron_prefix.data.steps.step_columns import dataset_members
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import check
from megatron_prefix.train.evaluation import (
    dataset_inputs,
    evaluate,
    preference_metrics,
    response_records,
)


class TwoGroups(SimpleNamespace):
    """Groups of 2 and 3 responses, with pairs [(0, 1)] and [(0, 2), (1, 2)] of their own."""

    def __len__(self) -> int:
        return 2


DATASET = TwoGroups(
    group_pairs=np.array([0, 1, 3]),
    group_responses=np.array([0, 2, 5]),
    group_records=np.array([4, 8]),
    pair_responses=np.array([[0, 1], [0, 2], [1, 2]], np.int32),
    pair_weights=np.array([1.0, 1.0, 3.0]),
    pair_margins=np.full(3, np.nan),
    pair_betas=np.full(3, np.nan),
    response_lengths=np.array([9, 8, 7, 6, 5], np.int32),
    response_prompts=np.array([4, 4, 2, 2, 2], np.int32),
    response_sets=np.array([0, 0, 0, 0, 1], np.int32),
    response_ranks=np.array([0, 1, 0, 0, 1], np.int32),
    response_scores=np.array([1.0, 0.0, 0.5, np.nan, 0.25]),
    desirable=np.array([1.0, 0.0, 1.0, 1.0, 0.0]),
    pair_sides=np.array([[0, 1], [2, 4], [3, 4]]),
    own_tokens=np.array([5, 4, 5, 4, 3]),
)


def test_sets_are_numbered_through_the_data_set():
    """The pairs of group 1 cross its sets here, so both of them have a pair."""
    assert dataset_members(DATASET).tolist() == [[0, 1], [2, 3], [4, -1]]
    inputs = dataset_inputs(check(LossConfig()), DATASET, np.zeros(5), np.zeros(5))
    assert inputs.set_weights.tolist() == [1.0, 1.0, 1.0]
    expected = {"pair": 5.0, "set": 3.0, "response": 4.0, "token": 5 + 5 + 12, "label": 5.0}
    assert inputs.denominators() == expected


def test_metrics_by_hand():
    """beta 0.5: margins of 1, -1 and 0 between the rewards of chosen and rejected."""
    scores = np.array([-10.0, -12.0, -20.0, -21.0, -18.0])
    ref_logps = np.array([-10.0, -10.0, -20.0, -23.0, -20.0])
    objective = check(LossConfig(beta=0.5))
    metrics = preference_metrics(objective, DATASET, scores, ref_logps)
    losses = [math.log1p(math.exp(-margin)) for margin in (1.0, -1.0, 0.0)]
    assert metrics["loss"] == pytest.approx(np.average(losses, weights=[1, 1, 3]), rel=1e-12)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["rewards/chosen"] == pytest.approx((0.0 + 0.0 + 1.0) / 3)
    assert metrics["rewards/rejected"] == pytest.approx((-1.0 + 1.0 + 1.0) / 3)
    assert metrics["rewards/accuracies"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["logps/chosen"] == pytest.approx((-10 - 20 - 21) / 3)
    assert metrics["num_pairs"] == 3


def test_a_line_for_every_response():
    scores = np.array([-1.0, -2.0, np.nan, -4.0, -5.0])
    lines = [json.loads(line) for line in response_records(DATASET, scores, "logp")]
    assert lines[1] == {"group": 0, "response": 1, "record": 4, "logp": -2.0, "num_tokens": 4}
    assert [line["logp"] for line in lines] == [-1.0, -2.0, None, -4.0, -5.0]
    assert [(line["group"], line["response"]) for line in lines[2:]] == [(1, 0), (1, 1), (1, 2)]


def test_what_is_missing_is_refused_before_a_model_is_built(tmp_path):
    with pytest.raises(InputError, match=r"data\.valid is not set"):
        evaluate(tiny_config("set", tmp_path), None, None)
    config = tiny_config("set", tmp_path, data={"valid": "set"})
    with pytest.raises(InputError, match="--per-response .*absent/file: no such directory"):
        evaluate(config, None, str(tmp_path / "absent" / "file"))
    with pytest.raises(InputError, match="there is no checkpoint"):
        evaluate(config, str(tmp_path), None)
