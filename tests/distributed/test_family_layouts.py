"""Parts that Llama lacks, divided over two processes, follow the trajectory of one process.

Every kind of part is in one of the models: norms over all heads and by head, norms of outputs,
layer norms, biases, multipliers, layers without rotation, two rotations, rotation of some channels,
parallel layers, layers without gate, shared experts, multi-latent attention.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import TIMEOUT_S, Runs, assert_same_history, assert_same_weights, on_processes

sys.path.append(str(Path(__file__).resolve().parents[1] / "numerics"))

from family_models import make_family  # noqa: E402

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP2SP, CP2 = {**TP2, "sequence_parallel": True}, {"context_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FAMILIES = ("olmo2", "cohere", "gpt-oss", "deepseek v3")
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXTRA = {
    "smollm3": {"no_rope_layers": [1, 0, 0, 1], "layer_types": ALTERNATING},
    "gemma3": {"layer_types": ALTERNATING},
    "qwen2 moe": {"layer_types": ALTERNATING},
    "deepseek v2, dense": {"first_k_dense_replace": 4},
    "deepseek v3, dense": {"first_k_dense_replace": 4},
    "gpt-oss": {"layer_types": ALTERNATING, "num_local_experts": 4},
}
LAYOUTS = {  # name: family, layout, settings of the model
    "olmo2 tp2": ("olmo2", TP2, {}),
    "olmo2 tp2sp": ("olmo2", TP2SP, {}),
    "cohere tp2sp": ("cohere", TP2SP, {}),
    "deepseek v3 tp2sp": ("deepseek v3", TP2SP, {}),
    "gpt-oss tp2sp": ("gpt-oss", TP2SP, {}),
    "gpt-oss ep2": ("gpt-oss", {"expert_model_parallel_size": 2}, {}),
}
MORE = {
    "olmo2 cp2": ("olmo2", CP2, {}),
    "granite tp2sp": ("granite", TP2SP, {}),
    "granite pp2": ("granite", PP2, {}),
    "glm4 tp2sp full": ("glm4", TP2SP, FULL),
    "glm4 cp2": ("glm4", CP2, {"recompute_granularity": "selective"}),
    "gemma3 pp2": ("gemma3", PP2, {}),
    "gemma3 cp2": ("gemma3", CP2, {}),
    "starcoder2 tp2sp": ("starcoder2", TP2SP, {}),
    "qwen2 moe tp2sp": ("qwen2 moe", TP2SP, {}),
    "gpt-oss pp2": ("gpt-oss", PP2, {}),
    "deepseek v2 dense tp2": ("deepseek v2, dense", TP2, {}),
    "deepseek v3 dense tp2sp": ("deepseek v3, dense", TP2SP, {}),
    "deepseek v3 pp2": ("deepseek v3", PP2, {"recompute_granularity": "selective"}),
    "deepseek v3 ep2": ("deepseek v3", {"expert_model_parallel_size": 2}, {}),
    "deepseek v2 cp2": ("deepseek v2", CP2, FULL),
    "deepseek v2 all to all": ("deepseek v2", {**CP2, "cp_comm": "all_to_all"}, {}),
    "smollm3 pp2": ("smollm3", PP2, {}),
    "smollm3 cp2": ("smollm3", {**CP2, "cp_comm": "all_gather"}, {}),
}


GROUPS, KEYS = 2, -2
"""In each group of heads the keys come before the values."""
UNROTATED = {"glm4": (16, slice(None), slice(8, None)), "smollm3": (8, [1, 2], slice(None))}
"""Channels of a head; layers and channels that are not rotated."""


def without_free_biases(family: str, key: str, difference: torch.Tensor) -> torch.Tensor:
    """A difference of parameters without key biases of channels that are not rotated.

    Such a bias b adds the same q b to all scores of a query, which softmax does not see. Its
    gradient is 0 up to rounding (in float64 below 1e-14 of the others), and Adam divides it by
    itself.
    """
    if family not in UNROTATED or not key.endswith("linear_qkv.bias"):
        return difference
    head_dim, layers, channels = UNROTATED[family]
    own = difference.clone().view(len(difference), GROUPS, -1, head_dim)
    keys = own[layers, :, KEYS]
    assert keys[..., channels].numel()
    keys[..., channels] = 0
    own[layers, :, KEYS] = keys
    return own


def save(runs: Runs, family: str, spread: float = 0.2) -> None:
    """The model of a family, of four layers."""
    more = {"num_hidden_layers": 4, **EXTRA.get(family, {})}
    make_family(family, runs.folder / "hf" / family, spread, **more)


def command(runs: Runs, name: str, family: str, layout: dict, settings: dict) -> list[str]:
    model = {"hf": str(runs.folder / "hf" / family), **settings}
    return runs.train(name, parallel=layout, model=model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("families"))
    for family in FAMILIES:
        save(runs, family)
    ones = [command(runs, family, family, {}, {}) for family in FAMILIES]
    on_processes(1, runs.folder, ones, TIMEOUT_S)
    twos = [command(runs, name, *rest) for name, rest in LAYOUTS.items()]
    on_processes(2, runs.folder, twos, 2 * TIMEOUT_S)
    return runs


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_follow_one(runs, name):
    family, _, _ = LAYOUTS[name]
    assert_same_history(runs.lines(name), runs.lines(family))
    assert_same_weights(runs, name, family)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_parts_and_layouts_too(name, tmp_path):
    runs, (family, layout, settings) = Runs(tmp_path), MORE[name]
    save(runs, family, spread=0.1)
    on_processes(1, tmp_path, [command(runs, family, family, {}, {})], TIMEOUT_S)
    on_processes(2, tmp_path, [command(runs, name, family, layout, settings)], TIMEOUT_S)
    assert_same_history(runs.lines(name), runs.lines(family))
    compared = partial(without_free_biases, family)
    assert_same_weights(runs, name, family, compared=compared)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TP2, TP2SP], ids=["tp2", "tp2sp"])
def test_adapters_before_multi_latent_attention_too(layout, tmp_path):
    runs, family = Runs(tmp_path), "deepseek v3, dense"
    save(runs, family, spread=0.1)
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    sections = {
        "model": {"hf": str(tmp_path / "hf" / family)},
        "lora": {"r": 4, "lora_alpha": 64.0, "target_modules": targets},
    }
    on_processes(1, tmp_path, [runs.train("one", parallel={}, **sections)], TIMEOUT_S)
    on_processes(2, tmp_path, [runs.train("two", parallel=layout, **sections)], TIMEOUT_S)
    assert_same_history(runs.lines("two"), runs.lines("one"))
    assert_same_weights(runs, "two", "one")
