"""Adapters in every layout follow the trajectory of one process.

All runs start from the same adapters, whose B is not zero, and have the frozen base as reference.
Data, steps and tolerances are those of the other layouts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from functools import partial
from unittest import mock

import pytest
import torch
from processes import on_ranks
from runs import (
    CUT,
    NUM_STEPS,
    TIMEOUT_S,
    Runs,
    assert_same_history,
    assert_same_weights,
    called,
    on_processes,
)
from safetensors.torch import save_file

from megatron_prefix.__main__ import main
from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.config.lora import TARGETS, LoraConfig
from megatron_prefix.distributed import join_world
from megatron_prefix.model.adapters.linear import AdaptedLinear
from megatron_prefix.model.gpt import TreeGPTModel
from megatron_prefix.model.hf.peft import peft_name
from megatron_prefix.model.layers import SEQUENCE_PARALLEL
from megatron_prefix.model.provider import model_provider, transformer_config
from megatron_prefix.testing import free_port

SIZES = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
SIZES |= {"num_query_groups": 2, "init_method_std": 0.1}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {**FULL, "recompute_method": "block"}
TIED = {"add_qkv_bias": True, "qk_layernorm": True, "untie_embeddings_and_output_weights": False}
BF16 = {"dtype": "bfloat16"}
MIXTURE = {"num_layers": 2, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
REWARD = {"kind": "reward"}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TP2SP = {**TP2, "sequence_parallel": True}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2, EP2 = {"context_parallel_size": 2}, {"expert_model_parallel_size": 2}
ZERO = {"use_distributed_optimizer": True}
OVERLAP = {**ZERO, "overlap_grad_reduce": True, "overlap_param_gather": True}

LORA = {"r": 4, "lora_alpha": 8}
STARTS = {  # name: model, adapters
    "plain": ({}, LORA),
    "tied": (TIED, {**LORA, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "saved": ({}, {**LORA, "layers_to_transform": [1], "modules_to_save": ["embed_tokens"]}),
    "last": ({}, {**LORA, "layers_to_transform": [3]}),
    "head": ({}, {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "mixture": (
        MIXTURE,
        {**LORA, "target_modules": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "attention": (MIXTURE, LORA),
    "reward": (REWARD, LORA),
    "bfloat16": (BF16, LORA),
}
ONES = {  # name: start, model beside SIZES and that of the start, other sections
    "one": ("plain", {}, {}),
    "one unshared": ("plain", {}, {"data": {"sharing": "none"}}),
    "one full": ("plain", FULL, {}),
    "one block": ("plain", BLOCK, {}),
    "one selective": ("plain", {"recompute_granularity": "selective"}, {}),
    "one tied": ("tied", {}, {}),
    "one saved": ("saved", {}, {}),
    "one last": ("last", {}, {}),
    "one head": ("head", {}, {}),
    "one mixture": ("mixture", {}, {}),
    "one balanced": ("mixture", {"moe_aux_loss_coeff": 0.05}, {}),
    "one attention": ("attention", {}, {}),
    "one reward": ("reward", {}, {}),
    "one start": ("plain", {}, {"lora": {"reference": "start"}}),
    "one aot": ("plain", {}, {"loss": {"loss_type": "aot"}}),
    "one bfloat16": ("bfloat16", {}, {}),
}
OF_TWO = {  # name: layout, model, the one-process run that it follows
    "tp2": (TP2, {}, "one"),
    "tp2sp": (TP2SP, {}, "one"),
    "tp2sp full": (TP2SP, FULL, "one"),
    "tp2sp tied block": (TP2SP, BLOCK, "one tied"),
    "tp2sp head": (TP2SP, {}, "one head"),
    "tp2sp mixture": (TP2SP, {}, "one mixture"),
    "tp2 start": (TP2, {}, "one start"),
    "tp2sp head peft": (TP2SP, {}, "one head"),
    "pp2 tied peft": (PP2, {}, "one tied"),
    "pp2": (PP2, {}, "one"),
    "pp2 tied full": (PP2, FULL, "one tied"),
    "pp2 saved": (PP2, {}, "one saved"),
    "pp2 last": (PP2, {}, "one last"),
    "vpp2 block": (VPP2, BLOCK, "one"),
    "cp2": (CP2, {}, "one"),
    "cp2 head": (CP2, {}, "one head"),
    "dp2": ({}, {}, "one"),
    "dp2 zero": (ZERO, {}, "one"),
    "dp2 overlaps": (OVERLAP, {}, "one tied"),
    "dp2 overlaps start": (OVERLAP, {}, "one start"),
    "dp2 zero aot": (ZERO, {}, "one aot"),
    "ep2": (EP2, {}, "one mixture"),
    "ep2 zero full": ({**EP2, **ZERO}, FULL, "one mixture"),
    "pp2 balanced": (PP2, {}, "one balanced"),
    "ep2 zero attention": ({**EP2, **ZERO}, {}, "one attention"),
    "tp2sp reward": (TP2SP, {}, "one reward"),
    "pp2 reward": (PP2, {}, "one reward"),
}
IN_BF16 = {
    "tp2sp bfloat16": (TP2SP, {}, "one bfloat16"),
    "dp2 zero bfloat16": (ZERO, {}, "one bfloat16"),
    "pp2 full bfloat16": (PP2, FULL, "one bfloat16"),
}
OF_FOUR = {
    "tp2pp2sp": ({**TP2SP, **PP2}, {}, "one"),
    "tp2dp2 zero": ({**TP2SP, **ZERO}, FULL, "one"),
    "tp2sp ep2": ({**TP2SP, **EP2}, {}, "one mixture"),
    "pp2cp2": ({**PP2, **CP2}, FULL, "one head"),
    "vpp2dp2 overlaps": ({**VPP2, **OVERLAP}, {}, "one tied"),
}
RESUMED = {  # name: the run that was cut, the layout it goes on in
    "tp-vpp": ("tp2sp full", VPP2),
    "pp-one": ("pp2", {}),
    "zero-tp": ("dp2 zero", {**TP2SP, **ZERO}),
    "ep-one": ("ep2 zero full", ZERO),
    "one-ep": ("one mixture", EP2),
    "head tp-pp": ("tp2sp head", PP2),
    "reward tp-pp": ("tp2sp reward", PP2),
    "start tp-zero": ("tp2 start", ZERO),
    "last pp-one": ("pp2 last", {}),
    "last one-pp": ("one last", PP2),
}

QUICK = {
    *("one", "one unshared", "one block", "one start"),
    *("tp2sp full", "tp2sp head peft", "tp2sp mixture", "tp2sp bfloat16", "pp2", "vpp2 block"),
    *("cp2", "dp2 overlaps start", "ep2 zero full", "tp-vpp", "ep-one"),
    *("tp2 start", "pp2 last", "start tp-zero", "last pp-one"),
}
"""What make test runs of these; make test-all runs all."""


def as_peft(runs: Runs, start: str) -> str:
    """The adapters of a start as a PEFT directory."""
    directory = runs.folder / f"peft {start}"
    if not directory.exists():
        directory.mkdir()
        _, settings = STARTS[start]
        targets = settings.get("target_modules", TARGETS)
        config = {**settings, "target_modules": targets, "peft_type": "LORA", "bias": "none"}
        (directory / "adapter_config.json").write_text(json.dumps(config))
        weights = {peft_name(name): x for name, x in runs.weights(f"start {start}", 3).items()}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):  # of 258 bytes, padded
            if (own := weights.get(f"base_model.model.{name}")) is not None:
                weights[f"base_model.model.{name}"] = own[:258].clone()
        save_file(weights, directory / "adapter_model.safetensors")
    return str(directory)


def command(runs: Runs, name: str, layout: dict, one: str, sizes: dict | None = None) -> list[str]:
    """A run like the one-process run `one`, in another layout."""
    start, own, sections = ONES[one]
    model, _ = STARTS[start]
    saved = as_peft(runs, start) if "peft" in name else runs.output(f"start {start}") / "saved"
    lora = {"adapter": str(saved), **sections.get("lora", {})}
    data = {"train": runs.data, "valid": runs.valid, "row_capacity": 120, "global_batch_size": 4}
    return runs.train(
        name,
        parallel=layout,
        model={**SIZES, **model, **own, **(sizes or {})},
        lora=lora,
        loss=sections.get("loss", {}),
        data={**data, "seed": 3, **sections.get("data", {})},
    )


def params(names) -> list:
    """Names of tests; those that are not QUICK are run by make test-all."""
    return [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in names]


def make(runs: Runs, names) -> None:
    """Make the runs of these names that do not exist, and the ones that they start from and
    follow."""
    twos = {name: given for name, given in {**OF_TWO, **IN_BF16}.items() if name in names}
    ones = {name: ONES[name][0] for name in ONES if name in names}
    ones |= {follows: ONES[follows][0] for _, _, follows in twos.values()}
    commands = []
    for name in dict.fromkeys(ones.values()):
        model, lora = STARTS[name]
        saved = str(runs.output(f"start {name}") / "saved")
        train = {"steps": 3, "save": saved}
        sections = {"model": {**SIZES, **model}, "optimizer": {"lr": 0.05}, "train": train}
        if not runs.output(f"start {name}").exists():
            commands.append(runs.train(f"start {name}", lora=lora, **sections))
    commands += [command(runs, x, {}, x) for x in ones if not runs.output(x).exists()]
    on_processes(1, runs.folder, commands, TIMEOUT_S)
    commands = [
        command(runs, name, layout, one, model)
        for name, (layout, model, one) in twos.items()
        if not runs.output(name).exists()
    ]
    on_processes(2, runs.folder, commands, 3 * TIMEOUT_S)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("lora"))
    make(runs, QUICK)
    return runs


@pytest.fixture(scope="module")
def all_runs(runs) -> Runs:
    make(runs, [*ONES, *OF_TWO, *IN_BF16])
    return runs


@pytest.fixture
def made(request, name) -> Runs:
    """The runs, with that of the test's `name` among them."""
    return request.getfixturevalue("runs" if name in QUICK else "all_runs")


@pytest.mark.parametrize("name", params(["one unshared", "one full", "one block", "one selective"]))
def test_sharing_and_recomputation_change_nothing(made, name):
    assert_same_history(made.lines(name), made.lines("one"))
    assert_same_weights(made, name, "one")


@pytest.mark.parametrize("name", params(OF_TWO))
def test_two_processes_follow_one(made, name):
    follows = OF_TWO[name][2]
    assert_same_history(made.lines(name), made.lines(follows))
    assert_same_weights(made, name, follows)


@pytest.mark.parametrize("name", params(IN_BF16))
def test_bfloat16_follows_one_process(made, name):
    """Within what 8 bits of a log-probability change of the loss and its gradient."""
    pairs = zip(made.lines(name), made.lines("one bfloat16"), strict=True)
    steps = [(ours, theirs) for ours, theirs in pairs if "loss" in theirs]
    assert len(steps) == NUM_STEPS
    for ours, theirs in steps:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    start, ours, theirs = (
        made.weights(run, step)
        for run, step in (("start bfloat16", 3), (name, NUM_STEPS), ("one bfloat16", NUM_STEPS))
    )
    apart = sum(float((ours[key] - x).float().norm()) for key, x in theirs.items())
    moved = sum(float((start[key] - x).float().norm()) for key, x in theirs.items())
    assert apart < 0.2 * moved


def test_the_runs_learn(runs):
    """Adapters move, all of them: A and B of every layer that is named."""
    start, end = runs.weights("start plain", 3), runs.weights("one")
    assert start.keys() == end.keys() and len(end) == 4 * 7 * 2
    assert min(float((end[key] - x).abs().max()) for key, x in start.items()) > 1e-3


def called_without_the_sum(commands: list[tuple[list[str], int]]) -> int:
    """Runs whose whole factors are not marked: under sequence parallelism a rank's gradient of them
    is that of its own tokens only."""
    own = AdaptedLinear._mark

    def unmarked(self, adapter, is_shared_by_experts):
        own(self, adapter, is_shared_by_experts)
        for factor in adapter.parameters():
            setattr(factor, SEQUENCE_PARALLEL, False)

    with mock.patch.object(AdaptedLinear, "_mark", unmarked):
        return called(commands)


def test_a_missing_sum_over_tensor_parallel_ranks_is_found(runs):
    commands = [(command(runs, "unsummed", TP2SP, "one"), free_port())]
    on_ranks(2, partial(called_without_the_sum, commands), runs.folder, TIMEOUT_S)
    with pytest.raises(AssertionError, match="grad_norm"):
        assert_same_history(runs.lines("unsummed"), runs.lines("one"))


def keeps_no_gathered_input() -> int:
    """0 if no adapted layer saves, for its backward pass, an input that was gathered."""
    parallel, rows = ParallelConfig(**TP2SP), 48
    with join_world(parallel, seed=0) as world:
        config = transformer_config(
            ModelConfig(**SIZES),
            vocab_size=64,
            seed=1,
            parallel=parallel,
            lora=LoraConfig(r=4),
            adapter_seed=1,
        )
        layer = model_provider(config=config, pg_collection=world.groups).decoder.layers[0]
        own = torch.randn(rows // 2, 1, SIZES["hidden_size"], requires_grad=True)
        saved: list[tuple[int, ...]] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output, _ = layer.self_attention.linear_qkv(own)
        assert output.shape[0] == rows and (rows // 2, SIZES["hidden_size"]) in {
            (shape[0], shape[-1]) for shape in saved
        }
        return int(any(shape[0] == rows and shape[-1] > 3 * 4 for shape in saved))


def test_sequence_parallel_adapters_keep_their_own_tokens_only(tmp_path):
    on_ranks(2, keeps_no_gathered_input, tmp_path, TIMEOUT_S)


def test_an_input_without_a_gradient_is_found_under_recomputation(runs, monkeypatch):
    """Silently: `uniform` then trains nothing, and `block` leaves its layers out."""
    monkeypatch.setattr(TreeGPTModel, "_with_gradient", lambda self, decoder_input: decoder_input)
    names = {"one full": "no gradient uniform", "one block": "no gradient block"}
    commands = [command(runs, name, {}, follows) for follows, name in names.items()]
    on_processes(1, runs.folder, commands, TIMEOUT_S)
    norms = [row["grad_norm"] for row in runs.lines("no gradient uniform") if "loss" in row]
    assert norms == [0.0] * NUM_STEPS
    for name in names.values():
        with pytest.raises(AssertionError, match="grad_norm"):
            assert_same_history(runs.lines(name), runs.lines("one"))


def is_refused(argv: list[str], port: int) -> int:
    """0 if rank 0 exits with 2 and names the rank that has nothing to train. The others exit with
    2, too, or find that rank 0 has ended."""
    os.environ["MASTER_PORT"] = str(port)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(argv)
    if os.environ["RANK"] != "0":
        return int(code not in (1, 2))
    return int(code != 2 or "there is nothing to train on rank 1" not in errors.getvalue())


def test_a_stage_without_a_share_of_the_optimizer_is_refused(runs, tmp_path):
    lora = {**LORA, "layers_to_transform": [0]}
    argv = runs.train("idle", parallel={**PP2, **ZERO}, model=SIZES, lora=lora)
    on_ranks(2, partial(is_refused, argv, free_port()), tmp_path, TIMEOUT_S)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_follow_one(all_runs, name):
    layout, model, follows = OF_FOUR[name]
    own = [command(all_runs, name, layout, follows, model)]
    on_processes(4, all_runs.folder, own, 2 * TIMEOUT_S)
    assert_same_history(all_runs.lines(name), all_runs.lines(follows))
    assert_same_weights(all_runs, name, follows)


@pytest.mark.parametrize("name", params(RESUMED))
def test_a_checkpoint_is_resumed_in_another_layout(made, name):
    saved, layout = RESUMED[name]
    follows = OF_TWO[saved][2] if saved in OF_TWO else saved
    assert CUT < NUM_STEPS
    made.cut(saved, name)
    own = [command(made, name, layout, follows)]
    on_processes(1 if layout in ({}, ZERO) else 2, made.folder, own, TIMEOUT_S)
    assert_same_history(made.lines(name), made.lines(follows))
    assert_same_weights(made, name, follows)
