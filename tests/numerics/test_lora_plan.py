"""What `plan` counts of adapters, against models that are built and run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
from processes import on_ranks
from small_runs import configure, prepare

from megatron_prefix.__main__ import main
from megatron_prefix.config import ModelConfig, ParallelConfig, parse_config
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.distributed.world import join_world
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.adapters import (
    adapted_memory,
    adapter_activations,
    adapter_counts,
    adapter_flops,
    rank_adapters,
    stage_indices,
    training_flops,
)
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.memory import rank_parameters
from megatron_prefix.estimate.planning import plan_run
from megatron_prefix.model.adapters import is_added, is_trained
from megatron_prefix.model.provider import model_provider, transformer_config

TIMEOUT_S = 120
TINY = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    make_vocab_size_divisible_by=4,
)
MIXTURE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
EXPERTS = {"target_modules": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
CASES = {  # model, lora
    "all": ({}, {}),
    "some": (
        {"add_qkv_bias": True},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 3]},
    ),
    "copies": ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "attention of a mixture": (MIXTURE, {}),
    "experts": (MIXTURE, EXPERTS),
    "reward": ({"kind": "reward"}, {}),
    "scores": ({"kind": "reward", "num_labels": 3}, {"modules_to_save": ["embed_tokens"]}),
}
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "stages": {"pipeline_model_parallel_size": 2},
    "chunks": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "experts": {"expert_model_parallel_size": 2},
}


def resolved(model: ModelConfig, **lora) -> LoraConfig:
    given = LoraConfig(**{"r": 4, **lora})
    return given.resolved(model.sizes().num_moe_experts > 0, model.num_layers)


def compare(case: str, parallel: ParallelConfig, world) -> None:
    """Parameters of this rank: of the base, and those that are added."""
    changes, section = CASES[case]
    model = replace(TINY, **changes)
    lora = resolved(model, **section)
    config = transformer_config(model, vocab_size=10, seed=1, lora=lora, parallel=parallel)
    chunks = parallel.virtual_pipeline_model_parallel_size
    stage, last = world.groups.pp.rank(), world.groups.pp.size() - 1
    named = []
    for chunk in range(chunks) if chunks else [None]:
        is_first = stage == 0 and not chunk
        is_last = stage == last and chunk in (None, (chunks or 0) - 1)
        built = model_provider(is_first, is_last, chunk, config=config, pg_collection=world.groups)
        named += [(name, x.numel(), x.requires_grad) for name, x in built.named_parameters()]
    added = sum(numel for name, numel, _ in named if is_added(name))
    sizes = model.sizes()
    assert added == sum(rank_adapters(model, sizes, parallel, lora, 10, stage)), case
    base = sum(numel for _, numel, _ in named) - added
    assert base == sum(rank_parameters(model, sizes, parallel, 10, stage)), case
    memory = adapted_memory(
        model, sizes, parallel, lora, vocab_size=10, world_size=2, row_tokens=8, stage=stage
    )
    trained = sum(numel for _, numel, is_on in named if is_on)
    assert trained == sum(numel for name, numel, _ in named if is_trained(name))
    assert memory.gradients == 4 * trained, case
    assert (memory.weights, memory.adapters) == (4 * base, 4 * added), case
    assert memory.optimizer == 8 * trained and memory.reference == 0, case


def compare_all(parallel: dict) -> None:
    layout = ParallelConfig(**parallel)
    with join_world(layout, seed=0) as world:
        for case, (changes, _) in CASES.items():
            has_experts = "num_moe_experts" in changes
            if layout.expert_model_parallel_size == 1 or has_experts:
                compare(case, layout, world)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_of_two_ranks_are_those_that_are_built(name, tmp_path):
    on_ranks(2, partial(compare_all, LAYOUTS[name]), tmp_path, TIMEOUT_S)


@pytest.mark.parametrize("case", CASES)
def test_parameters_of_one_process(case):
    """And those of the whole model, whose vocabulary of 12 needs no padding."""
    changes, section = CASES[case]
    model = replace(TINY, **changes)
    lora, sizes = resolved(model, **section), model.sizes()
    with join_world(ParallelConfig(), seed=0) as world:
        compare(case, ParallelConfig(), world)
    counts = adapter_counts(lora, sizes, 12, model.kind, model.num_labels)
    memory = adapted_memory(
        model, sizes, ParallelConfig(), lora, vocab_size=12, world_size=1, row_tokens=8, stage=0
    )
    assert memory.adapters == 4 * (counts["adapters"] + counts["whole_copies"])
    assert memory.gradients == 4 * counts["trained"]


def test_known_counts():
    """Llama-3.1-8B: as PEFT's `print_trainable_parameters` has it for all linear layers at 16."""
    llama = ModelConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
        num_query_groups=8,
    )  # fmt: skip
    counts = adapter_counts(resolved(llama, r=16), llama.sizes(), 128_256)
    assert counts == {"adapters": 41_943_040, "whole_copies": 0, "trained": 41_943_040}


def test_layers_of_interleaved_stages():
    chunks = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    assert stage_indices(8, ParallelConfig(**chunks)) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    uneven = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}
    assert stage_indices(4, ParallelConfig(**uneven)) == [[0], [1, 2, 3]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_distributed", [False, True])
def test_bytes_of_a_run_are_those_of_the_plan(dtype, is_distributed, random_set, tmp_path):
    """After a step: weights, gradient buffers and optimizer state, byte by byte. Only a bucket of
    the distributed optimizer is padded."""
    config = configure(
        tmp_path / "run", random_set, model={"dtype": dtype}, lora={"r": 4},
        parallel={"use_distributed_optimizer": is_distributed}, train={"steps": 1},
    )  # fmt: skip
    plan = plan_run(config)
    (planned,) = plan["memory"]["stages"]
    with join_world(config.parallel, 0) as world:
        trainer = prepare(config, world)
        trainer.train_step()
        (chunk,) = trainer.policy.chunks
        named = dict(chunk.named_parameters())
        of_base = [x for x in named.values() if not x.requires_grad]
        of_adapters = [x for x in named.values() if x.requires_grad]
        assert planned["weights"] == sum(x.nbytes for x in of_base)
        assert planned["adapters"] == sum(x.nbytes for x in of_adapters)
        assert plan["trained_parameters"] == sum(x.numel() for x in of_adapters)
        buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
        gradients = sum(b.grad_data.nbytes for b in buffers)
        padding = 64 * len(of_adapters) * 4 if is_distributed else 0
        assert planned["gradients"] <= gradients <= planned["gradients"] + padding
        (part,) = trainer.policy.optimizer.chained_optimizers
        state = [x for own in part.optimizer.state.values() for x in own.values() if x.dim()]
        if dtype == "bfloat16":
            state += part.optimizer.state.keys()  # the float32 weights
        assert planned["optimizer"] == sum(x.nbytes for x in state)
        assert planned["reference"] == 0 and trainer.reference.chunks[0] is chunk.module
        trainer.close()


def test_the_values_of_the_start_are_kept_for_that_reference_only():
    lora = replace(resolved(TINY), adapter="somewhere", reference="start")
    for reference, expected in (("start", 1), ("base", 0)):
        memory = adapted_memory(
            TINY, TINY.sizes(), ParallelConfig(), replace(lora, reference=reference),
            vocab_size=12, world_size=1, row_tokens=8, stage=0, has_reference=True,
        )  # fmt: skip
        assert memory.reference == expected * memory.adapters


def test_activations_of_adapters():
    """The example of the code: seven adapters of rank 16 in bfloat16, 224 bytes of a token."""
    model = replace(TINY, dtype="bfloat16")
    lora = resolved(model, r=16)

    def per_token(section: LoraConfig, **parallel) -> float:
        return adapter_activations(
            model, model.sizes(), ParallelConfig(**parallel), section, 10, 0
        ) / 10  # fmt: skip

    assert per_token(lora) == 224
    assert per_token(lora, **LAYOUTS["tensor"]) == 160 + 32
    assert per_token(replace(lora, layers_to_transform=(1,))) == 224 / 4


def test_operations():
    """By hand: 2 layers, 8 tokens. A frozen matrix costs two passes, everything else three."""
    model = replace(TINY, num_layers=2)
    lora = resolved(model, target_modules=["q_proj"], layers_to_transform=[1])
    forward = ForwardFlops(linear=100.0, attention=10.0, head=5.0, adapters=1.0)
    assert adapter_flops(lora, model.sizes(), 8) == 2 * 8 * 4 * (32 + 32)
    assert training_flops(forward, lora) == 2 * 100 + 3 * 10 + 2 * 5 + 3 * 1
    assert training_flops(forward, lora, has_reference=True) == 243 + 115
    assert training_flops(forward, lora, "reward") == 243 + 5
    assert training_flops(forward, replace(lora, modules_to_save=("lm_head",))) == 243 + 5
    assert training_flops(replace(forward, adapters=0.0), None, has_reference=True) == 4 * 115
    mixture = replace(model, **MIXTURE)
    of_experts = resolved(mixture, target_modules=["up_proj"])
    assert adapter_flops(of_experts, mixture.sizes(), 8) == 2 * 8 * 2 * 2 * 4 * (32 + 24)


def raw(folder, dataset: str, **sections) -> dict:
    return {
        "data": {"train": dataset, "row_capacity": 8192, "global_batch_size": 4},
        "model": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96,
                  "num_attention_heads": 4, "num_query_groups": 2},
        "train": {"steps": 1},
        "optimizer": {"lr": 1e-3},
        "logging": {"output": str(folder / "run")},
        **sections,
    }  # fmt: skip


def test_the_command_prints_what_is_trained(random_set, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw(tmp_path, random_set, lora={"r": 4})))
    assert main(["plan", "--config", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    adapters = plan["parameters"]["adapters"]
    # two layers: q and o 64 + 64, k and v 64 + 32, gate, up and down 64 + 96
    assert adapters == plan["trained_parameters"] == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 160)
    costs = plan["data"]["sharing"]["tree"]
    assert costs["forward_flops"] < costs["training_flops"] < costs["full_training_flops"]
    assert main(["plan", "--config", str(path)]) == 0
    text = capsys.readouterr().out
    assert "adapters" in text and f"trained{adapters:,}" in text.replace(" ", "")
    assert "training with sharing tree: " in text


def test_shadow_steps_take_the_gradients_of_adapters(random_set, tmp_path):
    settings = raw(tmp_path, random_set, lora={"r": 4}, train={"steps": 2, "shadow_steps": 1})
    plan = plan_run(parse_config(settings))
    (stage,) = plan["memory"]["stages"]
    assert stage["host_gradients"] == stage["gradients"] == 4 * plan["trained_parameters"]


def test_an_adapter_gives_its_settings(random_set, tmp_path):
    """PEFT's own directory; one that is not on this machine is named."""
    lora = {"adapter": str(tmp_path / "adapter")}
    settings = raw(tmp_path, random_set, lora=lora)
    plan = plan_run(parse_config(settings))
    assert plan["parameters"] is plan["memory"] is None
    assert plan["missing"][0].startswith(f"lora.adapter = {lora['adapter']} is not on this machine")
    (tmp_path / "adapter").mkdir()
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(own))
    plan = plan_run(parse_config(settings))
    assert plan["trained_parameters"] == 2 * 2 * (64 + 64) and plan["missing"] == []
    with pytest.raises(InputError, match="lora.r = 8, and the adapter has 2"):
        plan_run(parse_config({**settings, "lora": {**lora, "r": 8}}))


def test_layers_that_the_model_does_not_have_are_refused(random_set, tmp_path):
    settings = raw(tmp_path, random_set, lora={"layers_to_transform": [2]})
    with pytest.raises(InputError, match="the model has layers 0 to 1"):
        plan_run(parse_config(settings))


def test_the_time_is_known_and_there_is_no_advice_on_a_reference(random_set, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    bfloat16 = raw(tmp_path, random_set)["model"] | {"dtype": "bfloat16"}
    path.write_text(json.dumps(raw(tmp_path, random_set, model=bfloat16, lora={"r": 4})))
    assert main(["plan", "--config", str(path), "--gpu", "H100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["time"]["seconds"]["reference"] > 0 and plan["missing"] == []
    assert plan["fit"] is not None and not any("reference" in line for line in plan["advice"])
