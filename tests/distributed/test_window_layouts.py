"""Models with sliding windows, soft caps and sinks follow the trajectory of one process in every
layout, and their checkpoints load in others.

Windows are shorter than most conversations and are in every second layer, and rows differ in
length.
"""

from __future__ import annotations

import pytest
import torch
from runs import TIMEOUT_S, Runs, assert_same_history, assert_same_weights, on_processes

SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "init_method_std": 0.1,
    "window_size": [4, 0],
    "window_attn_skip_freq": [1, 0, 1, 0],
    "attn_logit_softcapping": 0.5,
    "softmax_type": "learnable",
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
NO_CAP = {"attn_logit_softcapping": None}
TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2, CP2 = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
OF_TWO = {  # name: layout, sizes beside SIZES, the one-process run that it follows
    "tp2sp": (TP2SP, {}, "one"),
    "pp2 full": (PP2, FULL, "one"),
    "cp2 needed_rows": (CP2, {}, "one"),
    "cp2 all_gather": ({**CP2, "cp_comm": "all_gather"}, NO_CAP, "one no cap"),
    "cp2 all_to_all": ({**CP2, "cp_comm": "all_to_all"}, {}, "one"),
    "dp2 zero": ({"use_distributed_optimizer": True}, {}, "one"),
}
OF_FOUR = {
    "tp2cp2sp": ({**TP2SP, **CP2}, {}, "one"),
    "pp2cp2 full": ({**PP2, **CP2}, FULL, "one"),
    "cp4": ({"context_parallel_size": 4}, NO_CAP, "one no cap"),
}


def command(runs: Runs, name: str, layout: dict, sizes: dict) -> list[str]:
    return runs.train(name, parallel=layout, model={**SIZES, **sizes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("windows"))
    plain = {"window_size": None, "window_attn_skip_freq": None, "softmax_type": "vanilla"}
    ones = {"one": {}, "one no cap": NO_CAP, "one plain": {**plain, **NO_CAP}}
    on_processes(1, runs.folder, [command(runs, x, {}, own) for x, own in ones.items()], TIMEOUT_S)
    twos = [command(runs, name, layout, sizes) for name, (layout, sizes, _) in OF_TWO.items()]
    on_processes(2, runs.folder, twos, 2 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_follow_one(runs, name):
    follows = OF_TWO[name][2]
    assert_same_history(runs.lines(name), runs.lines(follows))
    assert_same_weights(runs, name, follows)


def test_windows_caps_and_sinks_are_in_the_model(runs):
    """The runs above differ from one without them, and the sinks learn."""
    first = [
        next(row["grad_norm"] for row in runs.lines(name) if "grad_norm" in row)
        for name in ("one", "one no cap", "one plain")
    ]
    assert min(abs(first[0] - first[1]), abs(first[1] - first[2])) > 1e-3 * first[0]
    key = "decoder.layers.self_attention.core_attention.softmax_offset"
    early, late = (runs.weights("one", step)[key] for step in (2, 5))
    assert early.shape == (4, 4) and 0 < (early - late).abs().max() < 1
    assert 0.05 < torch.std(early) < 0.2, "they were drawn with init_method_std"


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_follow_one(runs, name):
    layout, sizes, follows = OF_FOUR[name]
    on_processes(4, runs.folder, [command(runs, name, layout, sizes)], 2 * TIMEOUT_S)
    assert_same_history(runs.lines(name), runs.lines(follows))


@pytest.mark.parametrize("saved, resumed", [("tp2sp", PP2), ("pp2 full", {})])
def test_a_checkpoint_is_resumed_in_another_layout(runs, saved, resumed):
    name = f"{saved} then {'-'.join(resumed) or 'dp2'}"
    runs.cut(saved, name)
    _, sizes, follows = OF_TWO[saved]
    on_processes(2, runs.folder, [command(runs, name, resumed, sizes)], TIMEOUT_S)
    assert_same_history(runs.lines(name), runs.lines(follows))
