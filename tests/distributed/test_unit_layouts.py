"""One objective of each unit with interleaved stages and with experts on two ranks: every one
follows the run of one process."""

from __future__ import annotations

import pytest
from ranked_sets import write_ranked_set
from runs import NUM_GROUPS, TIMEOUT_S, Runs, assert_same_history, assert_same_weights, on_processes

SIZES = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}
SIZES |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
LAYOUTS = {
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
}
UNITS = {  # name: loss section, model section beside the sizes
    "pair": ({"loss_type": "apo_zero", "comparisons": "best_vs_rest"}, {}),
    "token": ({"loss_type": "cpo", "cpo_alpha": 0.5}, {}),
    "set": ({"loss_type": "nca"}, {}),
    "response": ({"loss_type": "regression"}, {"kind": "reward"}),
}
CASES = [("pair", "vpp2"), ("token", "ep2"), ("set", "ep2"), ("response", "vpp2")]
OTHERS = [(x, y) for x in UNITS for y in LAYOUTS if (x, y) not in CASES]


def command(runs: Runs, unit: str, layout: str | None) -> list[str]:
    loss, model = UNITS[unit]
    name = f"{unit} {layout or 'alone'}"
    parallel = LAYOUTS[layout] if layout else {}
    return runs.train(name, parallel=parallel, model={**SIZES, **model}, loss=loss)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("units")
    runs = Runs(folder, write_ranked_set(folder / "ranked", 0, NUM_GROUPS), row_capacity=160)
    runs.valid = write_ranked_set(folder / "held-out", 1, 5)
    on_processes(1, folder, [command(runs, unit, None) for unit in UNITS], TIMEOUT_S)
    on_processes(2, folder, [command(runs, *case) for case in CASES], 2 * TIMEOUT_S)
    return runs


@pytest.fixture(scope="module")
def other_runs(runs) -> Runs:
    others = [command(runs, *case) for case in OTHERS]
    on_processes(2, runs.folder, others, 2 * TIMEOUT_S)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "layout"), OTHERS)
def test_other_layouts_follow_too(other_runs, unit, layout):
    check(other_runs, unit, layout)


@pytest.mark.parametrize(("unit", "layout"), CASES)
def test_two_processes_follow_one(runs, unit, layout):
    check(runs, unit, layout)


def check(runs: Runs, unit: str, layout: str) -> None:
    ours, theirs = f"{unit} {layout}", f"{unit} alone"
    assert_same_history(runs.lines(ours), runs.lines(theirs))
    assert_same_weights(runs, ours, theirs)


def test_the_objectives_differ(runs):
    """So the comparison can fail."""
    losses = [runs.lines(f"{unit} alone")[-1]["eval_loss"] for unit in UNITS]
    assert len({round(loss, 3) for loss in losses}) == len(losses)
