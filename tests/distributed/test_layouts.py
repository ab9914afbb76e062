"""Tensor, sequence, pipeline and virtual pipeline parallelism follow the trajectory of one process,
for language models and for reward models.

All runs of two processes are made by the same two. Rows differ in length, and the last step has a
single group, so that stages also pass empty rows.
"""

from __future__ import annotations

import pytest
from runs import (
    CUT,
    NUM_STEPS,
    TIMEOUT_S,
    Runs,
    assert_same_history,
    assert_same_weights,
    on_processes,
)

pytestmark = pytest.mark.sample

SIZES = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
QWEN = {"add_qkv_bias": True, "qk_layernorm": True, "untie_embeddings_and_output_weights": False}
REWARD = {"kind": "reward"}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP2SP = {**TP2, "sequence_parallel": True}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
OVERLAP = {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}

OF_TWO = {  # name: layout, sizes beside SIZES, the one-process run that it follows
    "tp2": (TP2, {}, "one"),
    "tp2sp": (TP2SP, {}, "one"),
    "pp2": (PP2, {}, "one"),
    "vpp2": (VPP2, {}, "one"),
    "tp2sp qwen": (TP2SP, QWEN, "one qwen"),
    "pp2 qwen full": (PP2, {**QWEN, **FULL}, "one qwen"),
    "vpp2 selective": (VPP2, {"recompute_granularity": "selective"}, "one"),
    "dp2 grad overlap": ({"overlap_grad_reduce": True}, {}, "one"),
    "dp2 overlaps": (OVERLAP, QWEN, "one qwen"),
    "pp2 uneven": ({**PP2, "num_layers_in_first_pipeline_stage": 1}, {}, "one"),
    "cp2 all_gather": ({**CP2, "cp_comm": "all_gather"}, {}, "one"),
    "cp2 all_to_all": ({**CP2, "cp_comm": "all_to_all"}, {}, "one"),
    "cp2 needed_rows": (CP2, {}, "one"),
    "cp2 qwen full": (CP2, {**QWEN, **FULL}, "one qwen"),
    "tp2 reward": (TP2, REWARD, "one reward"),
    "tp2sp reward": (TP2SP, REWARD, "one reward"),
    "pp2 reward full": (PP2, {**REWARD, **FULL}, "one reward"),
    "vpp2 reward": (VPP2, REWARD, "one reward"),
    "cp2 reward": (CP2, REWARD, "one reward"),
    "cp2 ipo": (CP2, {}, "one ipo"),
    "pp2 ipo": (PP2, {}, "one ipo"),
}
OF_FOUR = {
    "tp2pp2sp": ({**TP2SP, **PP2}, {}, "one"),
    "tp2dp2 zero": ({**TP2, **ZERO}, {}, "one"),
    "pp2dp2 zero": ({**PP2, **ZERO}, QWEN, "one qwen"),
    "vpp2dp2": (VPP2, {}, "one"),
    "vpp2dp2 overlaps": ({**VPP2, **OVERLAP}, QWEN, "one qwen"),
    "cp4": ({"context_parallel_size": 4}, {}, "one"),
    "tp2cp2sp": ({**TP2SP, **CP2}, {}, "one"),
    "pp2cp2": ({**PP2, **CP2, "cp_comm": "all_gather"}, QWEN, "one qwen"),
    "dp2cp2 zero": ({**CP2, **ZERO}, {}, "one"),
    "dp2cp2 heads": ({**CP2, "cp_comm": "all_to_all"}, {}, "one"),
    "tp2pp2sp reward": ({**TP2SP, **PP2}, REWARD, "one reward"),
    "tp2dp2 zero reward": ({**TP2, **ZERO}, REWARD, "one reward"),
    "tp2cp2sp reward": ({**TP2SP, **CP2}, REWARD, "one reward"),
}


def command(runs: Runs, name: str, layout: dict, sizes: dict) -> list[str]:
    loss = {"loss_type": "ipo"} if name.endswith("ipo") else {}
    return runs.train(name, parallel=layout, model={**SIZES, **sizes}, loss=loss)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("layouts"))
    sizes = {"one": {}, "one qwen": QWEN, "one reward": REWARD, "one ipo": {}}
    ones = [command(runs, name, {}, own) for name, own in sizes.items()]
    on_processes(1, runs.folder, ones, TIMEOUT_S)
    twos = [command(runs, name, layout, sizes) for name, (layout, sizes, _) in OF_TWO.items()]
    saved = str(runs.output("unread") / "saved")
    train = {"epochs": 1, "save": saved, "load": saved, "save_interval": CUT}
    twos.append(runs.train("unread", parallel=OVERLAP, model=SIZES, train=train))
    on_processes(2, runs.folder, twos, 2 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_follow_one(runs, name):
    follows = OF_TWO[name][2]
    assert_same_history(runs.lines(name), runs.lines(follows))
    assert_same_weights(runs, name, follows)


def test_weights_are_gathered_before_they_are_saved(runs):
    """No evaluation came between the optimizer's step and the checkpoint."""
    assert_same_weights(runs, "unread", "one", CUT)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_follow_one(runs, name):
    layout, sizes, follows = OF_FOUR[name]
    on_processes(4, runs.folder, [command(runs, name, layout, sizes)], 2 * TIMEOUT_S)
    assert_same_history(runs.lines(name), runs.lines(follows))


@pytest.mark.parametrize(
    "saved, resumed",
    [("tp2sp", VPP2), ("vpp2", {}), ("pp2", TP2), ("tp2sp reward", PP2), ("pp2 reward full", {})],
    ids=["tp-vpp", "vpp-dp", "pp-tp", "tp-pp reward", "pp-dp reward"],
)
def test_a_checkpoint_is_resumed_in_another_layout(runs, saved, resumed):
    name = f"{saved} then {'-'.join(resumed) or 'dp2'}"
    runs.cut(saved, name)
    _, sizes, follows = OF_TWO[saved]
    on_processes(2, runs.folder, [command(runs, name, resumed, sizes)], TIMEOUT_S)
    assert CUT < NUM_STEPS
    assert_same_history(runs.lines(name), runs.lines(follows))


@pytest.mark.slow
def test_one_step_in_each_of_four_layouts_is_one_history(runs):
    """TP 2 -> PP 2 -> DP 2 with its optimizer distributed -> CP 2, each resuming the last."""
    previous = None
    for step, layout in enumerate([{**TP2, **ZERO}, {**PP2, **ZERO}, ZERO, {**CP2, **ZERO}]):
        name = f"turn {step}"
        if previous:
            runs.cut(previous, name, step)
        saved = str(runs.output(name) / "saved")
        train = {"epochs": 1, "save": saved, "load": saved, "save_interval": 1}
        train["eval_interval"] = CUT
        argv = runs.train(name, parallel=layout, model=SIZES, train=train)
        on_processes(2, runs.folder, [argv], TIMEOUT_S)
        previous = name
    assert_same_history(runs.lines(previous), runs.lines("one"))
    assert_same_weights(runs, previous, "one")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [CP2, PP2, TP2SP], ids=["cp2", "pp2", "tp2sp"])
def test_a_precomputed_reference_in_the_same_layout(runs, layout):
    name = f"precomputed {next(iter(layout))}"
    sidecar = str(runs.folder / name)
    known = {"reference": "precomputed", "ref_logps": sidecar}
    config = runs.config(f"score {name}", parallel=layout, model=SIZES)
    score = ["score", "--config", config, "--output", sidecar]
    train = runs.train(name, parallel=layout, model=SIZES, loss=known)
    on_processes(2, runs.folder, [score, train], TIMEOUT_S)
    assert_same_history(runs.lines(name), runs.lines("one"))


@pytest.mark.parametrize(
    "layout, numbers",
    [
        ({"tensor_model_parallel_size": 4}, "num_query_groups = 2 is not a multiple"),
        ({"pipeline_model_parallel_size": 3}, "num_layers = 4 is not a multiple"),
        ({**PP2, "virtual_pipeline_model_parallel_size": 3}, "num_layers = 4 is not a multiple"),
        ({"sequence_parallel": True}, "tensor_model_parallel_size = 1"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs two chunks and two stages"),
        ({"context_parallel_size": 4, "cp_comm": "all_to_all"}, "num_query_groups = 2 is not a"),
        ({"cp_comm": "all_gather"}, "context_parallel_size = 1"),
        ({**PP2, "num_layers_in_first_pipeline_stage": 4}, "every stage needs a layer"),
        ({"num_layers_in_last_pipeline_stage": 2}, "there is one stage"),
        ({"overlap_param_gather": True}, "set parallel.use_distributed_optimizer"),
        (TP2, "1 process was started"),
        (CP2, "context_parallel_size = 2 asks for a multiple of 2"),
    ],
)
def test_what_does_not_divide_is_refused(runs, layout, numbers, capsys):
    from megatron_prefix.__main__ import main

    assert main(command(runs, "refused", layout, {})) == 2
    assert numbers in capsys.readouterr().err
