"""Parameters, memory and bubble against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.config.parts import Architecture
from megatron_prefix.estimate.memory import (
    chunks_in_flight,
    layer_activations,
    parameter_counts,
    pipeline_bubble,
    rank_memory,
    rank_parameters,
    stage_layers,
)

TINY = ModelConfig(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    make_vocab_size_divisible_by=4,
)
LLAMA_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    dtype="bfloat16",
)
LLAMA_70B = replace(
    LLAMA_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64
)
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
LAYER = 192 + 384 + 16
"""Parameters of TINY's layer: 8 (4 + 2 x 2) 2 + 8 x 8, then 3 x 8 x 16, then both norms."""


def total(model: ModelConfig, vocab_size: int) -> int:
    return sum(parameter_counts(model.sizes(), vocab_size).values())


def test_known_models():
    assert total(LLAMA_8B, 128_256) == 8_030_261_248
    assert total(LLAMA_70B, 128_256) == 70_553_706_496


def test_a_tiny_model_by_component():
    assert parameter_counts(TINY.sizes(), 10) == {
        "embedding": 80,
        "attention": 4 * 192,
        "feed_forward": 4 * 384,
        "norms": 4 * 16 + 8,
        "head": 80,
    }
    qwen = replace(TINY, add_qkv_bias=True, qk_layernorm=True)
    assert total(qwen, 10) - total(TINY, 10) == 4 * (16 + 4)
    assert total(replace(TINY, untie_embeddings_and_output_weights=False), 10) == 2536 - 80
    assert parameter_counts(TINY.sizes(), 10, "reward")["head"] == 8


def test_experts_take_the_place_of_the_feed_forward_network():
    mixture = replace(TINY, num_moe_experts=6, moe_ffn_hidden_size=5)
    counts = parameter_counts(mixture.sizes(), 10)
    assert counts["experts"] == 4 * 6 * 3 * 8 * 5 and counts["router"] == 4 * 6 * 8
    assert "feed_forward" not in counts
    parallel = ParallelConfig(expert_model_parallel_size=3, **TP2, sequence_parallel=True)
    dense, experts = rank_parameters(mixture, mixture.sizes(), parallel, 10, 0)
    assert experts == 4 * 6 * 3 * 8 * 5 // 6
    biased = replace(mixture.sizes(), architecture=Architecture(expert_bias=True))
    # of gate and up 2 x 5 / 2 are divided by both ranks, the 8 after down are on each
    _, more = rank_parameters(mixture, biased, parallel, 10, 0)
    assert more - experts == 4 * 6 // 3 * (2 * 5 // 2 + 8)
    assert dense == 4 * 192 // 2 + 4 * 16 + 4 * 6 * 8 + 8 + 2 * (16 // 2 * 8)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_and_tensor_ranks_hold_their_parts(tied):
    model = replace(TINY, untie_embeddings_and_output_weights=not tied)
    parallel = ParallelConfig(**PP2, num_layers_in_first_pipeline_stage=1)
    assert stage_layers(model.num_layers, parallel) == [1, 3]
    assert rank_parameters(model, model.sizes(), parallel, 10, 0) == (12 * 8 + LAYER, 0)
    assert rank_parameters(model, model.sizes(), parallel, 10, 1) == (12 * 8 + 3 * LAYER + 8, 0)
    alone = 4 * LAYER + 8 + (1 if tied else 2) * 12 * 8
    assert rank_parameters(model, model.sizes(), ParallelConfig(), 10, 0) == (alone, 0)
    halves = ParallelConfig(**TP2)  # the vocabulary is padded to a multiple of 8
    expected = 4 * (LAYER - 16) // 2 + 4 * 16 + 8 + (1 if tied else 2) * 16 // 2 * 8
    assert rank_parameters(model, model.sizes(), halves, 10, 0) == (expected, 0)


def test_a_ranks_weights_are_those_that_are_built(tmp_path):
    """Against the model itself, in every sense: biases, norms of heads, experts, reward head."""
    from megatron_prefix.distributed.world import join_world
    from megatron_prefix.model.provider import model_provider, transformer_config

    mixture = {"num_moe_experts": 6, "moe_ffn_hidden_size": 5}
    qwen = {"add_qkv_bias": True, "qk_layernorm": True}
    with join_world(ParallelConfig(), seed=0) as world:
        for changes in ({}, qwen, mixture, {"kind": "reward"}, {"kind": "reward", **mixture}):
            model = replace(TINY, **changes)
            config = transformer_config(model, vocab_size=10, seed=1)
            built = model_provider(config=config, pg_collection=world.groups)
            num_parameters = sum(rank_parameters(model, model.sizes(), ParallelConfig(), 10, 0))
            assert num_parameters == sum(p.numel() for p in built.parameters()), changes


def memory(model: ModelConfig, parallel: dict, world_size: int = 1, stage: int = 0, **given):
    settings = {"vocab_size": 12, "row_tokens": 100, **given}
    layout = ParallelConfig(**parallel)
    return rank_memory(model, model.sizes(), layout, world_size=world_size, stage=stage, **settings)


def test_states_of_the_optimizer():
    num = 4 * LAYER + 8 + 2 * 96
    exact = memory(TINY, {}, has_reference=True)
    assert (exact.weights, exact.gradients, exact.optimizer, exact.reference) == (
        4 * num,
        4 * num,
        8 * num,
        4 * num,
    )
    half = memory(replace(TINY, dtype="bfloat16"), {})
    assert (half.weights, half.gradients, half.optimizer, half.reference) == (
        2 * num,
        4 * num,
        12 * num,
        0,
    )
    zero = {"use_distributed_optimizer": True}
    assert memory(TINY, zero, world_size=4).optimizer == 2 * num
    assert memory(TINY, {}, world_size=4).optimizer == 8 * num
    assert memory(TINY, {**zero, "context_parallel_size": 2}, world_size=4).optimizer == 2 * num
    mixture = replace(TINY, num_moe_experts=6, moe_ffn_hidden_size=5)
    dense, experts = rank_parameters(mixture, mixture.sizes(), ParallelConfig(), 12, 0)
    shared = memory(mixture, {**zero, "expert_model_parallel_size": 2}, world_size=4)
    assert shared.optimizer == 8 * dense // 4 + 8 * (experts // 2) // 2


def test_activations_of_a_layer():
    # 4 C + (2 N + 2 G) H + 3 F = 32 + 24 + 48 numbers of 4 bytes, and 4 N bytes
    assert layer_activations(TINY, TINY.sizes(), ParallelConfig(), 100) == 100 * (104 * 4 + 16)
    half = replace(TINY, dtype="bfloat16")
    assert layer_activations(half, TINY.sizes(), ParallelConfig(), 100) == 100 * 224
    whole = layer_activations(TINY, TINY.sizes(), ParallelConfig(**TP2), 100)
    assert whole == 100 * ((32 + 36) * 4 + 8)
    shared = layer_activations(
        TINY, TINY.sizes(), ParallelConfig(**TP2, sequence_parallel=True), 100
    )
    assert shared == 100 * (52 * 4 + 8)
    mixture = replace(TINY, num_moe_experts=6, moe_ffn_hidden_size=5)  # two experts a token
    assert (
        layer_activations(mixture, mixture.sizes(), ParallelConfig(), 1)
        == (32 + 24 + 2 * (16 + 15)) * 4 + 16
    )


def test_what_recomputation_keeps():
    layer = layer_activations(TINY, TINY.sizes(), ParallelConfig(), 100)
    kept = {
        "none": memory(TINY, {}),
        "selective": memory(replace(TINY, recompute_granularity="selective"), {}),
        "uniform": memory(replace(TINY, **FULL, recompute_method="uniform"), {}),
        "block": memory(replace(TINY, **FULL, recompute_method="block"), {}),
    }
    entry = 100 * 8 * 4
    assert {name: (m.activations, m.recomputed) for name, m in kept.items()} == {
        "none": (4 * layer, 0),
        "selective": (4 * (layer - 1600), 1600),
        "uniform": (4 * entry, layer),
        "block": (entry + 3 * layer, layer),
    }
    pairs = replace(TINY, **{**FULL, "recompute_num_layers": 2}, recompute_method="uniform")
    assert memory(pairs, {}).activations == 2 * entry and memory(pairs, {}).recomputed == 2 * layer
    halves = memory(TINY, {"context_parallel_size": 2}, world_size=2)
    assert halves.activations == 4 * layer // 2


def test_rows_in_flight():
    plain = ParallelConfig(pipeline_model_parallel_size=4)
    assert [chunks_in_flight(s, plain) for s in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(0, plain, rows=2) == 2
    chunks = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=5)
    assert [chunks_in_flight(s, chunks) for s in range(4)] == [23, 21, 19, 17]
    assert chunks_in_flight(0, chunks, rows=4) == 20
    # Narayanan et al. 2021: the first stage holds 1 + (p - 1) / (p v) times all layers
    assert 23 / 20 == 1 + 3 / 20
    assert pipeline_bubble(plain, 8) == 3 / 8 and pipeline_bubble(chunks, 8) == 3 / 40
    assert pipeline_bubble(ParallelConfig(), 3) == 0
    layer = layer_activations(TINY, TINY.sizes(), ParallelConfig(**PP2), 100)
    activations = [memory(TINY, PP2, world_size=2, stage=s).activations for s in (0, 1)]
    assert activations == [2 * 2 * layer, 2 * layer]


def test_the_head_is_on_the_last_stage_and_chunked():
    assert memory(TINY, PP2, world_size=2).head == 0
    hidden = 2 * 100 * 8 * 4
    assert memory(TINY, PP2, world_size=2, stage=1).head == hidden + 100 * 12 * 16
    small = replace(TINY, lm_head_chunk_size=10)
    assert memory(small, {}).head == hidden + 10 * 12 * 16
    assert memory(replace(TINY, kind="reward"), {}).head == hidden
