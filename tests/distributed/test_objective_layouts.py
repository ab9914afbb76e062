"""One objective of each unit, and of each part of responses, in layouts of two processes: every one
follows the run of one process."""

from __future__ import annotations

import pytest
from ranked_sets import write_ranked_set
from runs import NUM_GROUPS, TIMEOUT_S, Runs, assert_same_history, assert_same_weights, on_processes

TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

OBJECTIVES = {  # name: loss section, model section beside the sizes
    "tokens": ({"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.25}, {}),
    "on policy": ({"loss_type": "ipo", "use_weighting": True}, {}),
    "sets": ({"loss_type": "plackett_luce"}, FULL),
    "ranked rewards": ({"loss_type": "infonca"}, {"kind": "reward"}),
    "responses": ({"loss_type": "regression"}, {"kind": "reward"}),
}
LAYOUTS = {"cp2": CP2, "pp2": PP2, "tp2sp": TP2SP, "dp2 zero": ZERO}
CASES = [(x, y) for x in OBJECTIVES for y in ("cp2", "pp2")]
CASES += [(x, "dp2 zero") for x in ("tokens", "responses")]
CASES += [(x, "tp2sp") for x in ("on policy", "sets")]
SHOWN = ("rewards/top1", "nll_loss", "weights/mean", "rewards/max", "rewards/min", "mse")
SHOWN += ("kl", "logratios/chosen", "rewards/length_correlation", "eval_kl")
SHOWN += ("eval_rewards/length_correlation", "eval_rewards/accuracies/chosen_longer")
SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}


def command(runs: Runs, objective: str, layout: str | None) -> list[str]:
    loss, model = OBJECTIVES[objective]
    parallel = {} if layout is None else LAYOUTS[layout]
    name = f"{objective} {layout or 'alone'}"
    return runs.train(name, parallel=parallel, model={**SIZES, **model}, loss=loss)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("objectives")
    runs = Runs(folder, write_ranked_set(folder / "ranked", 0, NUM_GROUPS), row_capacity=160)
    runs.valid = write_ranked_set(folder / "held-out", 1, 5)
    alone = [command(runs, objective, None) for objective in OBJECTIVES]
    on_processes(1, folder, alone, TIMEOUT_S)
    on_processes(2, folder, [command(runs, *case) for case in CASES], 2 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize(("objective", "layout"), CASES)
def test_two_processes_follow_one(runs, objective, layout):
    ours, theirs = f"{objective} {layout}", f"{objective} alone"
    assert_same_history(runs.lines(ours), runs.lines(theirs))
    assert_same_weights(runs, ours, theirs)
    for a, b in zip(runs.lines(ours), runs.lines(theirs), strict=True):
        assert a.keys() == b.keys()
        for key in SHOWN:
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)


def test_the_objectives_differ(runs):
    """So the comparison can fail."""
    losses = [runs.lines(f"{name} alone")[-1]["eval_loss"] for name in OBJECTIVES]
    assert len({round(loss, 3) for loss in losses}) == len(losses)
