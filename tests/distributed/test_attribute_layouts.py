"""A reward model of several attributes in layouts of two processes follows one process."""

from __future__ import annotations

import pytest
from attribute_sets import write_attributes
from runs import NUM_GROUPS, TIMEOUT_S, Runs, assert_same_history, assert_same_weights, on_processes

LAYOUTS = {
    "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2 zero": {"use_distributed_optimizer": True},
}
MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
MODEL |= {"num_query_groups": 2, "init_method_std": 0.1, "kind": "reward", "num_labels": 3}
LOSS = {"loss_type": "regression", "attribute": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("attributes")
    runs = Runs(folder, write_attributes(folder, "some", 0, NUM_GROUPS), row_capacity=160)
    runs.valid = write_attributes(folder, "held-out", 1, 5)
    on_processes(1, folder, [runs.train("alone", model=MODEL, loss=LOSS)], TIMEOUT_S)
    commands = [
        runs.train(name, parallel=parallel, model=MODEL, loss=LOSS)
        for name, parallel in LAYOUTS.items()
    ]
    on_processes(2, folder, commands, 2 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_follow_one(runs, layout):
    ours, theirs = runs.lines(layout), runs.lines("alone")
    assert_same_history(ours, theirs)
    assert_same_weights(runs, layout, "alone")
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in (x for x in b if "mse/" in x):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (a["step"], key)
    assert sum("mse/" in key for key in theirs[-1]) == 3
