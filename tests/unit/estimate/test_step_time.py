"""Seconds of a step against numbers computed by hand, and how they change with the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.step_time import Job, StepWork, step_time, utilisation
from megatron_prefix.estimate.traffic import (
    LINK_EFFICIENCY,
    backward_bytes,
    data_bytes,
    forward_bytes,
    link,
    stage_bytes,
)
from megatron_prefix.platform.gpus import GPUS, Gpu

TINY = ModelConfig(
    num_layers=4,
    hidden_size=4,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    dtype="bfloat16",
    make_vocab_size_divisible_by=4,
)
MIXTURE = replace(TINY, num_moe_experts=4, moe_router_topk=3, moe_ffn_hidden_size=8)
SLOW = Gpu(
    name="slow",
    bf16_flops=1000.0,
    memory_gib=1,
    memory_bandwidth=1e30,
    nvlink=1e30,
    network=1e30,
)
"""1000 operations per second, and all traffic in no time."""
WORK = StepWork(
    flops=ForwardFlops(linear=600.0, attention=200.0, head=100.0),
    tokens=64,
    rows=4,
    busy_ranks=1,
)


def job(gpu: Gpu = SLOW, model: ModelConfig = TINY, world_size: int = 1, **settings) -> Job:
    sizes = model.sizes()
    assert sizes is not None
    given = {"mfu": 0.5, "vocab_size": 8, **settings}
    return Job(gpu=gpu, model=model, sizes=sizes, world_size=world_size, **given)


def test_peaks_of_the_data_sheets():
    assert {name: gpu.bf16_flops / 1e12 for name, gpu in GPUS.items()} == {
        "H100": 989.5,
        "H200": 989.5,
        "B200": 2250.0,
        "A100": 312.0,
    }


def test_one_rank_computes_three_forward_passes():
    time = step_time(job(), ParallelConfig(), WORK)
    assert time.compute == time.total == pytest.approx(3 * 900 / 500)
    assert utilisation(job(), WORK, time.total) == pytest.approx(0.5)


def test_a_reference_model_is_a_forward_pass():
    time = step_time(job(has_reference=True), ParallelConfig(), WORK)
    assert time.reference == pytest.approx(900 / 500)


@pytest.mark.parametrize(
    "settings, seconds",
    [
        (("selective", None, None), 200 / 500),
        (("full", "uniform", 1), 800 / 500),
        (("full", "block", 1), 200 / 500),
        (("full", "block", 3), 600 / 500),
    ],
)
def test_recomputation(settings, seconds):
    granularity, method, layers = settings
    model = replace(
        TINY,
        recompute_granularity=granularity,
        recompute_method=method,
        recompute_num_layers=layers,
    )
    time = step_time(job(model=model), ParallelConfig(), WORK)
    assert time.recompute == pytest.approx(seconds)
    assert time.compute == pytest.approx(3 * 900 / 500)


def test_recomputation_of_chunks():
    """2 stages of 2 chunks of 1 layer, one recomputed in each: all of them."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    model = replace(
        TINY, recompute_granularity="full", recompute_method="block", recompute_num_layers=1
    )
    time = step_time(job(model=model, world_size=2), parallel, WORK)
    assert time.recompute == pytest.approx(400 / 500)


def test_the_last_stage_has_the_head_and_gives_the_pace():
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    time = step_time(job(world_size=2), parallel, WORK)
    assert time.compute == pytest.approx(3 * (400 + 100) / 500)
    assert time.bubble == pytest.approx(time.compute / 4)  # (2 - 1) / 4 rows
    interleaved = replace(parallel, virtual_pipeline_model_parallel_size=2)
    assert step_time(job(world_size=2), interleaved, WORK).bubble == pytest.approx(time.bubble / 2)


def test_ranks_without_groups_do_not_help():
    parallel = ParallelConfig()
    four = replace(WORK, busy_ranks=4, rows=1)
    eight = step_time(job(world_size=8), parallel, four)
    assert eight.compute == step_time(job(world_size=4), parallel, four).compute
    assert eight.compute == pytest.approx(3 * 900 / 500 / 4)


def test_links():
    gpu = GPUS["H100"]
    assert link(gpu, 8) == LINK_EFFICIENCY * 450e9
    assert link(gpu, 16) == LINK_EFFICIENCY * 50e9


def test_bytes_of_a_layer_by_hand():
    """16 tokens of width 4 in 2 bytes: 128 bytes, of which a context-parallel rank owns 64."""
    sizes = TINY.sizes()
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    sent = forward_bytes(TINY, sizes, parallel, 16)
    # 2 all-reduces of 64 bytes; keys and values of 1 head of 2 channels, halved by t, other half
    assert sent == {"tensor": 4 * 64 / 2, "expert": 0.0, "context": 2 * 2 / 2 * 16 * 2 / 2}
    assert backward_bytes(TINY, parallel, sent) == {**sent, "context": 3 * sent["context"]}
    heads = replace(parallel, cp_comm="all_to_all")
    # queries and outputs of 2 heads, keys and values of 1, of 8 tokens; half stays
    assert forward_bytes(TINY, sizes, heads, 16)["context"] == 6 * 2 / 2 * 8 * 2 / 2
    assert backward_bytes(TINY, heads, sent) == sent


def test_bytes_of_experts_by_hand():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=4
    )
    sent = forward_bytes(MIXTURE, MIXTURE.sizes(), parallel, 16)
    # each rank routes 8 tokens of 8 bytes to 3 experts, and back; 3 of 4 ranks are others
    assert sent["expert"] == 2 * 3 * 64 * 3 / 4
    # one gather and scatter of 128 bytes around attention, one of 3 x 64 around the experts
    assert sent["tensor"] == 2 * 128 / 2 + 2 * 192 / 2


def test_bytes_between_stages_and_of_gradients():
    sizes = TINY.sizes()
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    assert stage_bytes(TINY, sizes, parallel, 16) == 2 * 2 * 16 * 4 * 2
    assert stage_bytes(TINY, sizes, ParallelConfig(), 16) == 0
    # all of TINY: 2 x 32 of the vocabulary, 4 layers of 48 + 96 + 8, and 4
    count = 64 + 4 * 152 + 4
    plain = data_bytes(TINY, ParallelConfig(), (count, 0), 4)
    assert (plain.gradients, plain.weights) == (2 * 4 * count * 3 / 4, 0)
    shared = ParallelConfig(use_distributed_optimizer=True)
    sent = data_bytes(TINY, shared, (count, 0), 4)
    assert (sent.gradients, sent.weights) == (4 * count * 3 / 4, 2 * count * 3 / 4)


def test_overlap_hides_at_most_one_row():
    """A row's backward pass takes 0.9 s; gradients 2 s, so 1.1 s are left."""
    count = 64 + 4 * 152 + 4
    rate = 4 * count * 3 / 4 / 2 / LINK_EFFICIENCY
    gpu = replace(SLOW, nvlink=rate)
    work = replace(WORK, busy_ranks=4, rows=1)
    parallel = ParallelConfig(use_distributed_optimizer=True)
    plain = step_time(job(gpu, world_size=4), parallel, work)
    assert plain.data == pytest.approx(2 + 1)
    hidden = replace(parallel, overlap_grad_reduce=True)
    assert step_time(job(gpu, world_size=4), hidden, work).data == pytest.approx(1.1 + 1)
    hidden = replace(hidden, overlap_param_gather=True)
    assert step_time(job(gpu, world_size=4), hidden, work).data == pytest.approx(1.1 + 0.55)


def test_the_optimizer_reads_and_writes_its_state_once():
    gpu = replace(SLOW, memory_bandwidth=1 / LINK_EFFICIENCY)
    time = step_time(job(gpu), ParallelConfig(), WORK)
    assert time.optimizer == (64 + 4 * 152 + 4) * (4 + 12 + 12 + 2)


def test_more_of_everything_takes_longer():
    gpu, parallel = GPUS["A100"], ParallelConfig(tensor_model_parallel_size=2)
    time = step_time(job(gpu, world_size=16), parallel, WORK)
    assert step_time(job(GPUS["B200"], world_size=16), parallel, WORK).total < time.total
    assert step_time(job(gpu, world_size=16, mfu=0.4), parallel, WORK).total > time.total
    more = replace(WORK, tokens=WORK.tokens * 2)
    assert step_time(job(gpu, world_size=16), parallel, more).tensor == 2 * time.tensor
    wide = ParallelConfig(tensor_model_parallel_size=16)
    assert step_time(job(gpu, world_size=16), wide, WORK).tensor > 12 * time.tensor
