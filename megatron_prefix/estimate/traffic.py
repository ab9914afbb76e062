"""Bytes that a GPU sends in a step, by kind of parallelism, from formulas.

For T tokens of a row, hidden size C, N query heads and G key-value heads of size H, b bytes per
value; t, p, v, c, e are the tensor, pipeline, virtual pipeline, context and expert parallel sizes.
A GPU owns T / c tokens. A reduce-scatter or all-gather of X bytes over n ranks sends X (n - 1) / n
from each, an all-reduce twice that (ring; Thakur et al. 2005, section 4). Per row and layer, in a
forward pass:

    tensor     2 all-reduces of T C b / c, or with sequence parallelism as many bytes as 2
               all-gathers and 2 reduce-scatters: 4 T C b / c (t - 1) / t  (Korthikanti et al.
               2022, arXiv 2205.05198, section 4.2.2). With experts the second pair has each token
               k times, divided over the t ranks first.
    experts    2 all-to-alls of k T C b / (c s) (e - 1) / e; s = t with sequence parallelism
               (GShard, Lepikhin et al. 2020, arXiv 2006.16668, section 3.2)
    context    keys and values of the other ranks, 2 G H T b / t (c - 1) / c at most: what
               `all_gather` sends. `needed_rows` sends as much only for one tree that fills the row.
               `all_to_all`: (2 N + 2 G) H T b / (c t) (c - 1) / c (Jacobs et al. 2023, arXiv
               2309.14509, section 3)

Backward sends as much; keys travel again there, and their gradients in float32. Per row:

    stages     T C b / (c s) forward and as much backward, for each of v chunks (Narayanan et al.
               2021, arXiv 2104.04473, section 3.2)

Per step: data-parallel ranks reduce gradients of 4 bytes and, with the distributed optimizer,
gather weights of b bytes (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.config import ModelConfig, ModelSizes, ParallelConfig
from megatron_prefix.estimate.memory import BYTES, GRADIENT_BYTES
from megatron_prefix.platform.gpus import GPUS_PER_NODE, Gpu

LINK_EFFICIENCY = 0.7
"""Share of a link's rate that large messages reach; an assumption, not measured."""


def link(gpu: Gpu, span: int) -> float:
    """Bytes per second of a group whose ranks lie within `span` neighbouring GPUs."""
    return LINK_EFFICIENCY * (gpu.nvlink if span <= GPUS_PER_NODE else gpu.network)


def ring(ranks: int) -> float:
    """What each of `ranks` sends of the bytes that are gathered; 4 ranks: 0.75."""
    return (ranks - 1) / ranks


def forward_bytes(
    model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig, row_tokens: float
) -> dict[str, float]:
    """Bytes that a GPU sends in the forward pass of one layer over a row of `row_tokens`, for
    `tensor`, `expert` and `context` parallelism."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    size, width = BYTES[model.dtype], sizes.hidden_size
    slices = tensor if parallel.sequence_parallel else 1
    # 8 tokens of width 4 in float32 over t = 2, c = 2: 4 tokens are owned, 64 bytes, of which
    # each of 4 collectives sends half: 128 bytes
    owned = row_tokens / context * width * size
    pair = 2 * owned * ring(tensor)
    routed = owned * sizes.moe_router_topk / slices * sizes.expert_layers / sizes.num_layers
    if parallel.cp_comm == "all_to_all":
        heads = 2 * (sizes.num_attention_heads + sizes.num_query_groups) / context
    else:
        heads = 2.0 * sizes.num_query_groups
    keys = heads * sizes.kernel_channels / tensor * row_tokens * size
    return {
        "tensor": pair + (2 * routed * ring(tensor) if routed else pair),
        "expert": 2 * routed * ring(parallel.expert_model_parallel_size),
        "context": keys * ring(context),
    }


def backward_bytes(
    model: ModelConfig, parallel: ParallelConfig, forward: dict[str, float]
) -> dict[str, float]:
    """The same in the backward pass, from what forward sends."""
    if parallel.cp_comm == "all_to_all":
        return forward
    # keys again, and their gradients in float32: in bfloat16 3 times the bytes of forward
    again = 1 + GRADIENT_BYTES / BYTES[model.dtype]
    return {**forward, "context": forward["context"] * again}


def stage_bytes(
    model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig, row_tokens: float
) -> float:
    """Bytes that a GPU sends to its neighbours in the pipeline for one row, both ways."""
    if parallel.pipeline_model_parallel_size == 1:
        return 0.0
    slices = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    tokens = row_tokens / parallel.context_parallel_size / slices
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return 2 * chunks * tokens * sizes.hidden_size * BYTES[model.dtype]


@dataclass(frozen=True, kw_only=True)
class DataTraffic:
    """Bytes that a GPU sends once per step: gradients, then weights."""

    gradients: float
    weights: float


def data_bytes(
    model: ModelConfig, parallel: ParallelConfig, trained: tuple[int, int], world_size: int
) -> DataTraffic:
    """Bytes of the reduced gradients and the gathered weights of a rank whose `trained` parameters
    are these: (all but those of experts, those of experts)."""
    dense, experts = trained
    # The copies of a parameter, whether or not they share the optimizer's state.
    stages = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    copies = world_size // stages
    share = dense * ring(copies)
    share += experts * ring(copies // parallel.expert_model_parallel_size)
    if parallel.use_distributed_optimizer:
        return DataTraffic(gradients=GRADIENT_BYTES * share, weights=BYTES[model.dtype] * share)
    return DataTraffic(gradients=2 * GRADIENT_BYTES * share, weights=0.0)
