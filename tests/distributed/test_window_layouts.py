"""Models with sliding windows, soft caps and sinks follow the trajectory of one process in every
layout, and their checkpoints load in others.

Windows are shorter than most conversations and are in every second layer, and rows differ in
length.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from runs import TIMEOUT_S, Runs, assert_same_history, assert_same_weights, on_processes

from megatron_prefix.data.store import PreferenceDataset

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


HF_SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "sliding_window": 5,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
HF_KINDS = {
    "mistral": {"head_dim": 8},
    "qwen2": {"use_sliding_window": True, "layer_types": MIXED},
}
HF_LAYOUTS = {"tp2sp": TP2SP, "pp2": PP2, "cp2": CP2}


def make_hf(kind: str, directory: Path) -> str:
    config = transformers.AutoConfig.for_model(kind, **HF_SIZES, **HF_KINDS[kind])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def judged(directory: str, prefix: str) -> np.ndarray:
    """Log-probability of every response by transformers, each path alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    dataset, sums = PreferenceDataset(prefix), []
    for tree in (dataset[group] for group in range(len(dataset))):
        for response in range(tree.num_responses):
            tokens, start = tree.response_tokens(response)
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            logps = model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            sums.append(float(logps.gather(1, ids[0, start:, None]).sum()))
    return np.array(sums)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Log-probabilities of held-out responses by transformers, and by us on two processes."""
    runs = Runs(tmp_path_factory.mktemp("transformers"))
    commands, files = [], {}
    for kind in HF_KINDS:
        directory = make_hf(kind, runs.folder / kind)
        files[kind, "transformers"] = judged(directory, runs.valid)
        for name, layout in HF_LAYOUTS.items():
            config = runs.config(f"{kind} {name}", parallel=layout, model={"hf": directory})
            files[kind, name] = runs.folder / f"{kind} {name}.jsonl"
            commands.append(["evaluate", "--config", config, "--per-response"])
            commands[-1].append(str(files[kind, name]))
    on_processes(2, runs.folder, commands, TIMEOUT_S)
    return files


@pytest.mark.parametrize("layout", HF_LAYOUTS)
@pytest.mark.parametrize("kind", HF_KINDS)
def test_windows_are_those_of_transformers_in_every_layout(scored, kind, layout):
    """The window of 5 is shorter than the prompts."""
    lines = scored[kind, layout].read_text().splitlines()
    ours, theirs = np.array([json.loads(x)["logp"] for x in lines]), scored[kind, "transformers"]
    assert ours.shape == theirs.shape and len(ours) > 10
    assert np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))) < 1e-4
