"""Parameters, memory of a rank and pipeline bubble, computed from sizes, not measured.

Layers of hidden size C with N query heads, G key/value heads of size H and feed-forward size F
(gated), a vocabulary of V; t, p, v, c, e are the tensor, pipeline, virtual pipeline,
context and expert parallel sizes and d data-parallel ranks. A rank holds, in bytes,

    weights        b per parameter         b = 2 (bfloat16) or 4 (float32)
    gradients      4 per parameter         float32, also with bfloat16 weights
    optimizer      12 per parameter        (8 with float32 weights); over d c ranks if distributed
    reference      b per parameter         with loss.reference: model

and activations, counted as in Korthikanti et al. 2022 (arXiv 2205.05198, section 4), but without
their term of size tokens x tokens, because attention keeps only its output and a log-sum-exp, and
without dropout. A layer keeps these numbers of each token of the row (s = t with sequence
parallelism, which divides the tokens; else s = 1):

    input, norm, second input, norm    4 C / s
    queries, keys, values, output      (2 N + 2 G) H / t,  and 4 N / t bytes of log-sum-exp
    gate and up, their product         3 F / t
    or with experts (k per token)      k (2 C + 3 F / t),  tokens spread evenly over ranks;
                                       a shared expert 3 F / t; the mean if layers differ

Multi-latent attention with ranks R_q and R_k, R rotated channels and values of V keeps, in place of
the third row, 4 N max(H, V) / t + N V / t + (2 R_q + 2 R_k + R) / s.

Selective recomputation drops the log-sum-exp, full recomputation all but the layer's input. The
buffers of a call of attention (attention.py) and those of the head are both counted, although they
are not held together. Not counted: CUDA's context, NCCL's buffers, keys in transfer between
context-parallel ranks, fragmentation. Leave room for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from megatron_prefix.config import ModelConfig, ModelSizes, ParallelConfig
from megatron_prefix.estimate.attention import PathShare, attention_buffers

BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
ADAM_BYTES = {"float32": 8, "bfloat16": 12}
"""Both moments in float32, and float32 weights if the model's own are bfloat16."""
USER_BUFFERS = 12
"""Products of a layer that Transformer Engine overlaps; each has a buffer of tokens x channels."""


def parameter_counts(
    sizes: ModelSizes, vocab_size: int, kind: str = "lm", num_labels: int = 1
) -> dict[str, int]:
    """Parameters of the whole model by component, the vocabulary unpadded; `kind` and
    `num_labels` are the model's.

    Llama-3-8B with a vocabulary of 128,256: their sum is 8,030,261,248.
    """
    width = sizes.hidden_size
    counts = Counter({"embedding": vocab_size * width})
    counts.update(_of_layers(sizes, range(sizes.num_layers)))
    counts["norms"] += width * (1 + sizes.architecture.norm_bias)  # after the last layer
    if kind == "reward":
        counts["head"] = num_labels * width
    else:
        counts["head"] = vocab_size * width if sizes.untie_embeddings_and_output_weights else 0
    return dict(counts)


def _of_layers(sizes: ModelSizes, layers: Iterable[int]) -> Counter[str]:
    """Parameters of several layers by component."""
    dense = sizes.architecture.dense_layers  # all before this one are the same, and all from it on
    counts: Counter[str] = Counter()
    for layer, number in Counter(dense * (index >= dense) for index in layers).items():
        one = layer_parameters(sizes, layer)
        counts.update({component: number * count for component, count in one.items()})
    return counts


def layer_parameters(sizes: ModelSizes, layer: int) -> dict[str, int]:
    """Parameters of a layer, counted from 0, by component.

    Of width 4, with 2 heads of 2, 1 group and feed-forward size 8: attention 4 * 8 + 4 * 4 = 48,
    feed-forward 3 * 4 * 8 = 96, norms 2 * 4.
    """
    width, head_dim, parts = sizes.hidden_size, sizes.kv_channels, sizes.architecture
    heads, groups = sizes.num_attention_heads, sizes.num_query_groups
    per_layer = {"before": 2, "after": 2, "both": 4}[parts.norms] - parts.parallel_layers
    norms = per_layer * width * (1 + parts.norm_bias) + (2 * head_dim if sizes.qk_layernorm else 0)
    counts: dict[str, int] = {}
    if (latent := parts.latent) is not None:
        down, counts["attention"] = latent.matrices(width, heads)
        query_rank = latent.query_rank or 0
        counts["compression"] = down + latent.down_bias * (latent.down_rows + query_rank)
        norms += latent.key_value_rank + query_rank
    else:
        qkv = (heads + 2 * groups) * head_dim
        attention = width * qkv + heads * head_dim * width + (qkv if sizes.add_qkv_bias else 0)
        attention += heads if sizes.softmax_type == "learnable" else 0
        attention += (heads + groups) * head_dim if parts.qk_norm != "none" else 0
        counts["attention"] = attention
    gates = 1 + parts.gated_linear_unit
    if sizes.has_experts(layer):
        experts, inner = sizes.num_moe_experts, sizes.moe_ffn_hidden_size
        biases = gates * inner if parts.expert_bias else 0
        counts["experts"] = experts * (3 * width * inner + biases)
        if parts.expert_bias:
            counts["expert_output_biases"] = experts * width
        has_correction = parts.routing is not None and parts.routing.score == "sigmoid"
        counts["router"] = experts * (width + parts.expert_bias + has_correction)
        if parts.shared_expert_size:
            counts["feed_forward"] = (gates + 1) * width * parts.shared_expert_size
            counts["router"] += width * parts.shared_expert_gate
    else:
        bias = gates * sizes.ffn_hidden_size if parts.mlp_bias else 0
        counts["feed_forward"] = (gates + 1) * width * sizes.ffn_hidden_size + bias
    if parts.output_bias or parts.mlp_bias:
        counts["output_biases"] = width * (parts.output_bias + parts.mlp_bias)
    return {**counts, "norms": norms}


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage; 10 layers on 3 stages, the first given 2: [2, 4, 4]."""
    stages = parallel.pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    named = (first is not None) + (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    counts = [left // max(stages - named, 1)] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


def stage_indices(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """The layers of each pipeline stage, counted from 0.

    8 layers on 2 stages of 2 chunks each: [[0, 1, 4, 5], [2, 3, 6, 7]].
    """
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    sizes = [count // chunks for count in stage_layers(num_layers, parallel)]
    indices: list[list[int]] = [[] for _ in sizes]
    start = 0
    for _ in range(chunks):
        for stage, size in enumerate(sizes):
            indices[stage] += range(start, start + size)
            start += size
    return indices


def rank_parameters(
    model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig, vocab_size: int, stage: int
) -> tuple[int, int]:
    """Parameters that a rank of pipeline stage `stage` holds: (all but experts, experts).

    Matrices are divided by the tensor parallel size, experts also by the expert parallel size;
    norms, routers, the compression of multi-latent attention and biases of outputs are on every
    rank. The vocabulary is padded as the model pads it, and a tied head is a second copy on the
    last stage.
    """
    tensor, width = parallel.tensor_model_parallel_size, sizes.hidden_size
    own = _of_layers(sizes, stage_indices(sizes.num_layers, parallel)[stage])
    dense = (own["attention"] + own["feed_forward"]) // tensor
    dense += own["norms"] + own["router"] + own["output_biases"] + own["compression"]
    final_norm = width * (1 + sizes.architecture.norm_bias)
    experts = own["experts"] // tensor + own["expert_output_biases"]
    vocabulary = padded_vocabulary(model, parallel, vocab_size) // tensor * width
    num_stages = parallel.pipeline_model_parallel_size
    is_tied = model.kind == "lm" and not sizes.untie_embeddings_and_output_weights
    if stage == 0:
        dense += vocabulary
    if stage == num_stages - 1:
        dense += final_norm
        if model.kind == "reward":
            dense += model.num_labels * width
        elif not is_tied or num_stages > 1:
            dense += vocabulary
    return dense, experts // parallel.expert_model_parallel_size


def padded_vocabulary(model: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> int:
    """Tokens of the embedding, padding included."""
    # 10 tokens on 2 tensor-parallel ranks, divisible by 4: a multiple of 8, so 16
    multiple = model.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def layer_activations(
    model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig, num_tokens: int
) -> int:
    """Bytes that one layer keeps for backward without recomputation, of `num_tokens` tokens of a
    row: those that a context-parallel rank owns."""
    size, tensor, width = BYTES[model.dtype], parallel.tensor_model_parallel_size, sizes.hidden_size
    heads = sizes.num_attention_heads
    slices = tensor if parallel.sequence_parallel else 1
    parts = sizes.architecture
    attention = (2 * heads + 2 * sizes.num_query_groups) * sizes.kernel_channels / tensor
    if (latent := parts.latent) is not None:
        compressed = 2 * latent.key_value_rank + 2 * (latent.query_rank or 0)
        attention += (compressed + latent.rotated_channels) / slices
        attention += heads * latent.value_channels / tensor
    dense_share = 1 - sizes.expert_layers / sizes.num_layers
    feed_forward = (2 + parts.gated_linear_unit) * sizes.ffn_hidden_size / tensor * dense_share
    if sizes.num_moe_experts:
        expert = 2 * width + 3 * sizes.moe_ffn_hidden_size / tensor
        of_experts = sizes.moe_router_topk * expert + 3 * parts.shared_expert_size / tensor
        feed_forward += of_experts * (1 - dense_share)
    # The layer of the example in `parameter_counts`, in float32 on one rank: 4 * 4 + (4 + 2) * 2 +
    # 3 * 8 = 52 values and 2 heads' log-sum-exp per token, 52 * 4 + 2 * 4 = 216 bytes.
    values = 4 * width / slices + attention + feed_forward
    return round(num_tokens * (values * size + 4 * heads / tensor))


def chunks_in_flight(stage: int, parallel: ParallelConfig, rows: int | None = None) -> int:
    """Forward passes through a chunk that a stage holds before the first backward frees one.

    They are at most the `rows` per step and rank; None: as many as the schedule wants. One chunk
    per stage (1F1B): p - stage. Interleaved (Narayanan et al. 2021, arXiv 2104.04473):
    2 (p - stage - 1) + (v - 1) p + 1.
    """
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    # 4 stages hold [4, 3, 2, 1] rows; with 2 chunks per stage [11, 9, 7, 5] passes through a chunk.
    if chunks is None:
        held = stages - stage
    else:
        held = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return held if rows is None else min(held, rows * (chunks or 1))


def pipeline_bubble(parallel: ParallelConfig, rows: float) -> float:
    """Time that stages wait over the time they compute: (p - 1) / (rows v); `rows` per step and
    rank (Narayanan et al. 2021, section 2.2)."""
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return (parallel.pipeline_model_parallel_size - 1) / (rows * chunks)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage, by use."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    """Kept from forward to backward, of all rows in flight."""
    recomputed: int
    """Layers that full recomputation holds at a time."""
    head: int
    """A chunk of logits with its gradient, and the hidden states before it."""
    attention: int = 0
    """What one call of attention holds for a moment in backward; see attention.py."""
    adapters: int = 0
    """Weights that a lora section adds, whole copies included."""
    user_buffers: int = 0
    """Transformer Engine's, with parallel.tp_comm_overlap."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def rank_memory(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    world_size: int,
    row_tokens: int,
    stage: int,
    has_reference: bool = False,
    rows: int | None = None,
    added_per_layer: int = 0,
    paths: PathShare | None = None,
) -> RankMemory:
    """Memory of a rank of pipeline stage `stage` at the longest row, `row_tokens` tokens;
    `added_per_layer` bytes are kept for backward beside those of `layer_activations`; `paths` is
    how much its rows share, None if that is not known."""
    size = BYTES[model.dtype]
    dense, experts = rank_parameters(model, sizes, parallel, vocab_size, stage)
    sharers, expert_sharers = state_sharers(parallel, world_size)
    adam = ADAM_BYTES[model.dtype]
    num_tokens = -(-row_tokens // parallel.context_parallel_size)
    layer = layer_activations(model, sizes, parallel, num_tokens) + added_per_layer
    activations, recomputed = _activations(model, sizes, parallel, layer, num_tokens, stage, rows)
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    return RankMemory(
        weights=size * (dense + experts),
        gradients=GRADIENT_BYTES * (dense + experts),
        optimizer=adam * dense // sharers + adam * experts // expert_sharers,
        reference=size * (dense + experts) if has_reference else 0,
        activations=activations,
        recomputed=recomputed,
        head=_head(model, sizes, parallel, vocab_size, num_tokens) if is_last else 0,
        attention=attention_buffers(model, sizes, parallel, row_tokens, paths),
        user_buffers=USER_BUFFERS * size * num_tokens * sizes.hidden_size
        if parallel.tp_comm_overlap
        else 0,
    )


def state_sharers(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Ranks that share the optimizer's state and the summed gradients of a parameter: (of all but
    experts, of experts)."""
    if not parallel.use_distributed_optimizer:
        return 1, 1
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    # 16 processes, t = p = 2: 4 ranks have the same parameters and share their state; with e = 2
    # only 2 ranks have the same experts
    sharers = world_size // model_ranks
    return sharers, sharers // parallel.expert_model_parallel_size


def host_gradients(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    world_size: int,
    stage: int,
) -> int:
    """Bytes of host memory of a rank while the second run of a step is compared with the first
    (`train.shadow_steps`): its share of the summed gradients, twice if an auxiliary loss of experts
    has to be left out of the comparison."""
    dense, experts = rank_parameters(model, sizes, parallel, vocab_size, stage)
    sharers, expert_sharers = state_sharers(parallel, world_size)
    copies = 2 if model.moe_aux_loss_coeff else 1
    return copies * GRADIENT_BYTES * (dense // sharers + experts // expert_sharers)


def host_copy(model: ModelConfig, parallel: ParallelConfig, num_parameters: int) -> int:
    """Bytes of host memory of a rank that writes a checkpoint in the background
    (`train.async_save`): weights and optimizer's state of the `num_parameters` that it holds and
    trains. With the distributed optimizer the first of the ranks that share a state writes it all.
    """
    # the distributed optimizer saves float32 weights apart from those of the model
    apart = 4 if parallel.use_distributed_optimizer and model.dtype == "float32" else 0
    return num_parameters * (BYTES[model.dtype] + ADAM_BYTES[model.dtype] + apart)


def _activations(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    layer: int,
    num_tokens: int,
    stage: int,
    rows: int | None,
) -> tuple[int, int]:
    """(kept from forward to backward, held during recomputation) of a stage, in bytes; a layer
    keeps `layer` of them without recomputation."""
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    layers = stage_layers(sizes.num_layers, parallel)[stage] // chunks
    in_flight = chunks_in_flight(stage, parallel, rows)
    tensor = parallel.tensor_model_parallel_size
    if model.recompute_granularity is None:
        return in_flight * layers * layer, 0
    if model.recompute_granularity == "selective":
        lse = round(num_tokens * 4 * sizes.num_attention_heads / tensor)
        return in_flight * layers * (layer - lse), lse
    slices = tensor if parallel.sequence_parallel else 1
    entry = round(num_tokens * sizes.hidden_size / slices * BYTES[model.dtype])
    together = model.recompute_num_layers
    assert together is not None, "full recomputation comes with a number of layers"
    if model.recompute_method == "uniform":
        # each block of layers keeps its input, and one block at a time is computed again
        return in_flight * (layers // together) * entry, together * layer
    # block: the first layers of every chunk are recomputed one at a time, the others keep all
    first = min(together, layers)
    return in_flight * (first * entry + (layers - first) * layer), layer


def _head(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    vocab_size: int,
    num_tokens: int,
) -> int:
    """Bytes of the logits, their float32 softmax, its gradient and the logits' gradient, and of
    the hidden states, gathered and selected."""
    size = BYTES[model.dtype]
    hidden = 2 * num_tokens * sizes.hidden_size * size
    if model.kind == "reward":
        return hidden
    columns = padded_vocabulary(model, parallel, vocab_size) // parallel.tensor_model_parallel_size
    return hidden + min(model.lm_head_chunk_size, num_tokens) * columns * (2 * size + 8)
