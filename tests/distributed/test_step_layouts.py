"""Objectives that need the whole step, in layouts of two processes: every one follows one process.

Every rank computes the loss of the same table, and the passes see the same weights, also while
these are still being gathered.
"""

from __future__ import annotations

import pytest
from labelled_sets import write_labelled_set
from ranked_sets import write_ranked_set
from runs import (
    BATCH,
    NUM_GROUPS,
    NUM_STEPS,
    TIMEOUT_S,
    Runs,
    assert_same_history,
    assert_same_weights,
    on_processes,
)

SIZES = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "num_layers": 2}
BALANCED = {**MOE, "moe_aux_loss_coeff": 0.05}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2, CP2 = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
EP2, BF16 = {"expert_model_parallel_size": 2}, {"dtype": "bfloat16"}
OVERLAP = {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}

AOT = {"loss_type": "aot"}
LIST = {"loss_type": ["aot_unpaired", "sft"], "ld_alpha": 0.25}
KTO, BCO = {"loss_type": "kto", "beta": 0.5}, {"loss_type": "bco", "beta": 0.5}
ALONE = {  # name: loss section, model section beside the sizes
    "aot": (AOT, {}),
    "list": (LIST, {}),
    "kto": (KTO, {}),
    "bco": (BCO, {}),
    "aot moe": (AOT, MOE),
    "aot balanced": (AOT, BALANCED),
    "kto moe": (KTO, MOE),
    "bco moe": (BCO, MOE),
    "kto bfloat16": (KTO, BF16),
    "bco bfloat16": (BCO, BF16),
}
OF_TWO = {  # name: layout, what is added to the model, the run of one process
    "aot tp2sp": (TP2SP, {}, "aot"),
    "aot pp2 full": (PP2, FULL, "aot"),
    "aot vpp2": (VPP2, {}, "aot"),
    "aot cp2": (CP2, {}, "aot"),
    "aot dp2 overlaps": (OVERLAP, {}, "aot"),
    "list cp2": ({**CP2, "cp_comm": "all_to_all"}, {}, "list"),
    "list dp2 zero": (ZERO, {}, "list"),
    "kto cp2": (CP2, {}, "kto"),
    "kto vpp2": (VPP2, {}, "kto"),
    "kto tp2sp": (TP2SP, FULL, "kto"),
    "kto dp2 overlaps": (OVERLAP, {}, "kto"),
    "bco cp2": (CP2, {}, "bco"),
    "bco pp2": (PP2, {}, "bco"),
    "bco dp2 zero": (ZERO, {}, "bco"),
    "moe ep2 overlaps": ({**OVERLAP, **EP2}, {}, "aot moe"),
    "kto ep2 zero": ({**ZERO, **EP2}, {}, "kto moe"),
    "bco ep2": (EP2, {}, "bco moe"),
    "balanced pp2": (PP2, {}, "aot balanced"),
}
IN_BF16 = {
    "kto tp2sp bfloat16": (TP2SP, {}, "kto bfloat16"),
    "bco dp2 zero bfloat16": (ZERO, {}, "bco bfloat16"),
}
OF_FOUR = {
    "aot tp2pp2sp": ({**TP2SP, **PP2}, {}, "aot"),
    "aot vpp2dp2 overlaps": ({**VPP2, **OVERLAP}, {}, "aot"),
    "list dp2cp2 zero": ({**CP2, **ZERO}, {}, "list"),
    "kto pp2dp2 zero": ({**PP2, **ZERO}, {}, "kto"),
}


def command(runs: Runs, name: str, layout: dict, added: dict, alone: str) -> list[str]:
    loss, model = ALONE[alone]
    data = {"train": runs.data, "valid": runs.valid, "row_capacity": 160}
    if loss in (KTO, BCO):
        folder = runs.folder
        data |= {"train": str(folder / "labels"), "valid": str(folder / "few labels")}
    data |= {"global_batch_size": BATCH, "seed": 3}
    model = {**SIZES, **model, **added}
    return runs.train(name, parallel=layout, model=model, loss=loss, data=data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("step objectives")
    data = write_ranked_set(folder / "ranked", 0, NUM_GROUPS, weighted=False)
    runs = Runs(folder, data, row_capacity=160)
    runs.valid = write_ranked_set(folder / "held-out", 1, 5, weighted=False)
    for name, seed, count in (("labels", 0, NUM_GROUPS), ("few labels", 1, 5)):
        write_labelled_set(folder / name, seed, count, mismatches=True)
    alone = [command(runs, name, {}, {}, name) for name in ALONE]
    on_processes(1, folder, alone, TIMEOUT_S)
    of_two = [command(runs, name, *case) for name, case in {**OF_TWO, **IN_BF16}.items()]
    on_processes(2, folder, of_two, 2 * TIMEOUT_S)
    return runs


@pytest.fixture(scope="module")
def runs_of_four(runs) -> Runs:
    of_four = [command(runs, name, *case) for name, case in OF_FOUR.items()]
    on_processes(4, runs.folder, of_four, 2 * TIMEOUT_S)
    return runs


def check(runs: Runs, name: str, follows: str) -> None:
    ours, theirs = runs.lines(name), runs.lines(follows)
    assert_same_history(ours, theirs)
    assert_same_weights(runs, name, follows)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in ("nll_loss", "moe/aux_loss", "rewards/chosen", "kl", "delta"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (a["step"], key)
    if ALONE[follows][0] is not KTO:
        assert pass_difference(ours) <= 1e-5


def pass_difference(lines: list[dict]) -> float:
    """The largest difference of a log-probability between the two passes of a step."""
    differences = [row["logps/pass_difference"] for row in lines if "loss" in row]
    assert len(differences) == NUM_STEPS
    return max(differences)


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_follow_one(runs, name):
    check(runs, name, OF_TWO[name][2])


@pytest.mark.parametrize("name", IN_BF16)
def test_bfloat16_follows_one_process(runs, name):
    """Within what 8 bits of a log-probability change of the loss and its gradient."""
    follows = IN_BF16[name][2]
    pairs = zip(runs.lines(name), runs.lines(follows), strict=True)
    steps = [(ours, theirs) for ours, theirs in pairs if "loss" in theirs]
    assert len(steps) == NUM_STEPS
    for ours, theirs in steps:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    if ALONE[follows][0] is BCO:
        assert pass_difference(runs.lines(name)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_follow_one(runs_of_four, name):
    check(runs_of_four, name, OF_FOUR[name][2])


def test_the_runs_differ(runs):
    """So the comparison can fail."""
    losses = [runs.lines(name)[-1]["eval_loss"] for name in ALONE]
    assert len({round(loss, 4) for loss in losses}) == len(losses)
