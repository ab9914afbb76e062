"""Experts shared among ranks follow the trajectory of one process that holds them all.

But for two runs the router's auxiliary loss has no weight: it is the one thing that depends on
rows. Data, steps and tolerances are those of the other layouts; the last step gives one rank an
empty row.
"""

from __future__ import annotations

import pytest
import torch
from runs import (
    CUT,
    NUM_STEPS,
    TIMEOUT_S,
    Runs,
    assert_same_history,
    assert_same_weights,
    on_processes,
)

from megatron_prefix.checkpoint.convert import export_hf

pytestmark = pytest.mark.sample

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}
SIZES |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
QWEN = {"qk_layernorm": True, "moe_router_pre_softmax": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BALANCED = {"moe_aux_loss_coeff": 0.05, "moe_count": "responses"}
EP2, PP2 = {"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
OVERLAP = {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}

ONES = {"one": {}, "one qwen": QWEN, "one balanced": BALANCED}
OF_TWO = {  # name: layout, sizes beside SIZES, the one-process run that it follows
    "ep2": (EP2, {}, "one"),
    "ep2 zero qwen full": ({**EP2, **ZERO}, {**QWEN, **FULL}, "one qwen"),
    "dp2": ({}, {}, "one"),
    "dp2 zero qwen": (ZERO, QWEN, "one qwen"),
    "tp2sp": (TP2SP, {}, "one"),
    "pp2": (PP2, {}, "one"),
    "cp2": (CP2, {}, "one"),
    "cp2ep2": ({**CP2, **EP2}, {}, "one"),
    "ep2 overlaps": ({**EP2, **OVERLAP}, QWEN, "one qwen"),
}
OF_FOUR = {
    "dp2 cp2ep2": ({**CP2, **EP2}, {}, "one"),
    "dp2ep2": (EP2, {}, "one"),
    "dp2ep2 zero": ({**EP2, **ZERO}, QWEN, "one qwen"),
    "tp2sp ep2": ({**TP2SP, **EP2}, {}, "one"),
    "pp2 ep2 full": ({**PP2, **EP2}, {**QWEN, **FULL}, "one qwen"),
}
BY_ROWS = {  # the auxiliary loss is the same where the rows are
    "tp2sp balanced": (TP2SP, BALANCED, "one balanced"),
    "cp2 balanced": (CP2, BALANCED, "one balanced"),
    "cp2ep2 balanced": ({**CP2, **EP2}, BALANCED, "one balanced"),
    "pp2 full balanced": (PP2, {**BALANCED, **FULL}, "one balanced"),
    "dp2 balanced": ({}, BALANCED, "dp2 balanced"),
    "ep2 balanced": (EP2, BALANCED, "dp2 balanced"),
}
RESUMED = {  # name: the run that was cut, the layout it goes on in, sizes beside SIZES
    "ep to ep": ("ep2", EP2, {}),
    "ep to ep zero": ("ep2 zero qwen full", {**EP2, **ZERO}, QWEN),
    "one to ep": ("one", EP2, {}),
    "one to ep zero": ("one", {**EP2, **ZERO}, {}),
    "ep zero to one": ("ep2 zero qwen full", {}, QWEN),
    "pp to ep": ("pp2", EP2, {}),
    "dp to ep zero": ("dp2 zero qwen", {**EP2, **ZERO}, QWEN),
    "ep to one": ("ep2", {}, {}),
    "ep to one zero": ("ep2 zero qwen full", ZERO, QWEN),
}


def command(runs: Runs, name: str, layout: dict, sizes: dict) -> list[str]:
    return runs.train(name, parallel=layout, model={**SIZES, **sizes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("experts"))
    ones = [command(runs, name, {}, sizes) for name, sizes in ONES.items()]
    on_processes(1, runs.folder, ones, TIMEOUT_S)
    twos = [command(runs, name, layout, sizes) for name, (layout, sizes, _) in OF_TWO.items()]
    twos += [command(runs, name, *given[:2]) for name, given in BY_ROWS.items()]
    on_processes(2, runs.folder, twos, 2 * TIMEOUT_S)
    return runs


@pytest.fixture(scope="module")
def resumed(runs) -> Runs:
    commands: dict[int, list] = {1: [], 2: []}
    for name, (saved, layout, sizes) in RESUMED.items():
        runs.cut(saved, name)
        commands[2 if EP2.items() <= layout.items() else 1].append(
            command(runs, name, layout, sizes)
        )
    path = str(runs.output("ep2") / "saved" / f"iter_{CUT:07d}")
    commands[1].append(command(runs, "from ep2", {}, {"checkpoint": path}))
    exported = str(runs.folder / "hf")
    export_hf(runs.output("one") / "saved" / f"iter_{CUT:07d}", exported, 10**9)
    commands[2].append(runs.train("from hf", parallel=EP2, model={"hf": exported}))
    for count, given in commands.items():
        on_processes(count, runs.folder, given, TIMEOUT_S)
    return runs


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_follow_one(runs, name):
    follows = OF_TWO[name][2]
    assert_same_history(runs.lines(name), runs.lines(follows))
    assert_same_weights(runs, name, follows)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_follow_one(runs, name):
    layout, sizes, follows = OF_FOUR[name]
    on_processes(4, runs.folder, [command(runs, name, layout, sizes)], 2 * TIMEOUT_S)
    assert_same_history(runs.lines(name), runs.lines(follows))
    assert_same_weights(runs, name, follows)


@pytest.mark.parametrize("name", BY_ROWS)
def test_layouts_that_share_rows_have_the_same_auxiliary_loss(runs, name):
    history, expected = runs.lines(name), runs.lines(BY_ROWS[name][2])
    assert_same_history(history, expected)
    balances = [row["moe/aux_loss"] for row in expected if "loss" in row]
    assert min(balances) > 0.9 and max(balances) > 1.001, "the experts are chosen equally often"
    theirs = [row["moe/aux_loss"] for row in history if "loss" in row]
    assert theirs == pytest.approx(balances, rel=1e-5)
    plain = [row["grad_norm"] for row in runs.lines("one") if "loss" in row]
    balanced = [row["grad_norm"] for row in expected if "loss" in row]
    apart = [abs(b - p) / p for p, b in zip(plain, balanced, strict=True)]
    assert max(apart) > 1e-3, "the auxiliary loss has no gradient"


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_is_resumed(resumed, name):
    """On any ranks, however the experts were divided before."""
    follows = "one qwen" if RESUMED[name][2] else "one"
    assert CUT < NUM_STEPS
    assert_same_history(resumed.lines(name), resumed.lines(follows))
    assert_same_weights(resumed, name, follows)


@pytest.mark.parametrize("name, source", [("from ep2", "ep2"), ("from hf", "one")])
def test_weights_are_read_by_other_ranks(resumed, name, source):
    """What two ranks saved by one process; an exported model by two, each its own experts."""
    first = resumed.lines(name)[0]
    expected = next(r for r in resumed.lines(source) if "eval_loss" in r and r["step"] == CUT)
    chosen = "eval_logps/chosen"
    assert first[chosen] == pytest.approx(expected[chosen], rel=1e-5)


@pytest.mark.parametrize(
    "layout, sizes, numbers",
    [
        ({"expert_model_parallel_size": 3}, {}, "num_moe_experts = 4 is not a multiple"),
        (EP2, {}, "1 process was started"),
        ({}, {"num_moe_experts": None}, "model.moe_ffn_hidden_size = 24 without"),
        (EP2, {"num_moe_experts": None}, "are for models with experts, and this one has none"),
        ({"tensor_model_parallel_size": 2}, {}, "needs parallel.sequence_parallel: true"),
        ({}, {"moe_router_topk": 5}, "moe_router_topk = 5 is above model.num_moe_experts = 4"),
        ({}, {"moe_router_topk": 1}, "set moe_router_pre_softmax: true"),
        (TP2SP, {"moe_ffn_hidden_size": 25}, "model.moe_ffn_hidden_size = 25"),
        ({}, {"moe_count": "responses"}, "set the coefficient, or remove moe_count"),
        ({}, {"moe_expert_capacity_factor": 1.0}, "unknown key model.moe_expert_capacity_factor"),
    ],
)
def test_what_does_not_fit_is_refused(runs, layout, sizes, numbers, capsys):
    from megatron_prefix.__main__ import main

    assert main(command(runs, "refused", layout, sizes)) == 2
    assert numbers in capsys.readouterr().err
    assert torch.distributed.is_initialized() is False
