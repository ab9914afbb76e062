"""Parameters, memory and operations of a run with adapters, computed from sizes.

The base is frozen. It is in memory once, in the model's dtype, and has neither gradients nor
optimizer state; the same weights with adapters off are the reference. An adapter of rank r beside a
matrix of `inputs` x `outputs` has r (inputs + outputs) parameters. Of t tensor-parallel ranks each
has, as model/adapters/linear.py divides them,

    column parallel (q, k, v, gate, up)    A whole, a part of B    r (inputs + outputs / t)
    row parallel (o, down)                 a part of A, B whole    r (inputs / t + outputs)
    whole (compression of latent attention)        both whole      r (inputs + outputs)

and keeps r values of each token of the row for backward: of all tokens after A of a column, of its
own tokens under sequence parallelism after A of a row. Besides these it keeps what training of all
weights keeps, which is an upper bound.

Backward of a frozen matrix needs the gradient of its input only, which costs one forward pass, not
two. That of an adapter, of a trained copy and of attention costs two.

Not counted: the A of fused layers side by side, r x inputs values of each of them in a layer, and
the padding of gradient buckets with the distributed optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_prefix.config import ModelConfig, ModelSizes, ParallelConfig
from megatron_prefix.config.lora import FEED_FORWARD_TARGETS, LoraConfig
from megatron_prefix.estimate.attention import PathShare
from megatron_prefix.estimate.flops import ForwardFlops
from megatron_prefix.estimate.memory import (
    ADAM_BYTES,
    BYTES,
    GRADIENT_BYTES,
    RankMemory,
    padded_vocabulary,
    rank_memory,
    rank_parameters,
    stage_indices,
    state_sharers,
)
from megatron_prefix.estimate.vision import KnownVision

ROW_PARALLEL = ("o_proj", "down_proj")
WHOLE = ("q_a_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class AdaptedMatrix:
    """A frozen matrix of a layer that has an adapter, or one of each expert."""

    inputs: int
    outputs: int
    is_row: bool
    is_expert: bool
    is_whole: bool = False
    """Whether every tensor-parallel rank has the whole matrix, and the whole adapter."""

    def parameters(self, rank: int, tensor: int = 1) -> int:
        """Of its adapter, on one of `tensor` ranks."""
        tensor = 1 if self.is_whole else tensor
        if self.is_row:
            return rank * (self.inputs // tensor + self.outputs)
        return rank * (self.inputs + self.outputs // tensor)


def adapted_matrices(lora: LoraConfig, sizes: ModelSizes) -> list[AdaptedMatrix]:
    """The matrices of one adapted layer, once for all its experts; `lora` is resolved."""
    width, head_dim = sizes.hidden_size, sizes.kv_channels
    has_experts = sizes.num_moe_experts > 0
    queries, keys = sizes.num_attention_heads * head_dim, sizes.num_query_groups * head_dim
    inner = sizes.moe_ffn_hidden_size if has_experts else sizes.ffn_hidden_size
    shapes = {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    if (latent := sizes.architecture.latent) is not None:
        heads, latent_rank = sizes.num_attention_heads, latent.key_value_rank
        values = heads * latent.value_channels
        shapes |= {
            "q_a_proj": (width, latent.query_rank or 0),
            "q_b_proj": (latent.query_rank or 0, queries),
            "kv_a_proj_with_mqa": (width, latent.down_rows),
            "kv_b_proj": (latent_rank, heads * latent.unrotated_channels + values),
            "o_proj": (values, width),
        }
    return [
        AdaptedMatrix(
            *shapes[name],
            is_row=name in ROW_PARALLEL,
            is_expert=has_experts and name in FEED_FORWARD_TARGETS,
            is_whole=name in WHOLE,
        )
        for name in lora.target_modules or ()
    ]


def adapter_counts(
    lora: LoraConfig, sizes: ModelSizes, vocab_size: int, kind: str = "lm", num_labels: int = 1
) -> dict[str, int]:
    """Parameters that the lora section adds to the whole model, and those that are trained, the
    vocabulary unpadded. A reward model's head is trained, but not added.

    32 layers of hidden size 4096 with 8 key heads of 128 and feed-forward size 14336 at r = 16:
    32 x 16 x 81,920 = 41,943,040 (each of q and o 8192, k and v 5120, gate, up and down 18,432).
    """
    layers = sum(lora.adapts_layer(index) for index in range(sizes.num_layers))
    adapters = layers * _layer_parameters(lora, sizes, sizes.num_moe_experts)
    copies = len(lora.modules_to_save or ()) * vocab_size * sizes.hidden_size
    head = num_labels * sizes.hidden_size if kind == "reward" else 0
    return {"adapters": adapters, "whole_copies": copies, "trained": adapters + copies + head}


def rank_adapters(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    lora: LoraConfig,
    vocab_size: int,
    stage: int,
) -> tuple[int, int]:
    """Parameters that the lora section adds to a rank of pipeline stage `stage`: (all but those of
    experts, those of experts)."""
    tensor, rank = parallel.tensor_model_parallel_size, lora.r or 0
    layers = sum(
        lora.adapts_layer(index) for index in stage_indices(sizes.num_layers, parallel)[stage]
    )
    matrices = adapted_matrices(lora, sizes)
    dense = layers * sum(m.parameters(rank, tensor) for m in matrices if not m.is_expert)
    local_experts = sizes.num_moe_experts // parallel.expert_model_parallel_size
    experts = (
        layers * local_experts * sum(m.parameters(rank, tensor) for m in matrices if m.is_expert)
    )
    vocabulary = padded_vocabulary(model, parallel, vocab_size) // tensor * sizes.hidden_size
    saved, last = lora.modules_to_save or (), parallel.pipeline_model_parallel_size - 1
    dense += vocabulary * ("embed_tokens" in saved and stage == 0)
    dense += vocabulary * ("lm_head" in saved and stage == last)
    return dense, experts


def adapted_memory(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    lora: LoraConfig,
    *,
    vocab_size: int,
    world_size: int,
    row_tokens: int,
    stage: int,
    has_reference: bool = False,
    rows: int | None = None,
    paths: PathShare | None = None,
) -> RankMemory:
    """Memory of a rank of pipeline stage `stage` in a run with adapters, as `rank_memory` has it
    for the training of all weights. A reference needs memory with `lora.reference: start` only:
    the values of the start of what is trained."""
    added, experts = rank_adapters(model, sizes, parallel, lora, vocab_size, stage)
    dense = added + _trained_head(model, sizes, parallel, stage)
    num_tokens = -(-row_tokens // parallel.context_parallel_size)
    frozen = rank_memory(
        model,
        sizes,
        parallel,
        vocab_size=vocab_size,
        world_size=world_size,
        row_tokens=row_tokens,
        stage=stage,
        rows=rows,
        paths=paths,
        added_per_layer=adapter_activations(model, sizes, parallel, lora, num_tokens, stage),
    )
    size, adam = BYTES[model.dtype], ADAM_BYTES[model.dtype]
    sharers, expert_sharers = state_sharers(parallel, world_size)
    keeps_start = has_reference and lora.reference == "start"
    return replace(
        frozen,
        adapters=size * (added + experts),
        gradients=GRADIENT_BYTES * (dense + experts),
        optimizer=adam * dense // sharers + adam * experts // expert_sharers,
        reference=size * (dense + experts) if keeps_start else 0,
    )


def adapted_host_gradients(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    lora: LoraConfig,
    *,
    vocab_size: int,
    world_size: int,
    stage: int,
) -> int:
    """`host_gradients` of a run with adapters, whose gradients are those of what is trained."""
    dense, experts = trained_parameters(model, sizes, parallel, lora, vocab_size, stage)
    sharers, expert_sharers = state_sharers(parallel, world_size)
    copies = 2 if model.moe_aux_loss_coeff else 1
    return copies * GRADIENT_BYTES * (dense // sharers + experts // expert_sharers)


def adapter_activations(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    lora: LoraConfig,
    num_tokens: int,
    stage: int,
) -> int:
    """Bytes that adapters add to what a layer keeps for backward, in the mean of the layers of
    pipeline stage `stage`; `num_tokens` as in `layer_activations`."""
    slices = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    # All seven at r = 16 in bfloat16: 5 x 16 values of a token after the A of columns and 2 x 16
    # after those of rows, 224 bytes; on 2 ranks with sequence parallelism 160 + 32 bytes.
    values = 0.0
    for matrix in adapted_matrices(lora, sizes):
        if matrix.is_expert:
            values += sizes.moe_router_topk * (lora.r or 0)
        else:
            values += (lora.r or 0) / (slices if matrix.is_row or matrix.is_whole else 1)
    indices = stage_indices(sizes.num_layers, parallel)[stage]
    share = sum(lora.adapts_layer(index) for index in indices) / max(len(indices), 1)
    return round(share * num_tokens * values * BYTES[model.dtype])


def adapter_flops(lora: LoraConfig, sizes: ModelSizes, num_tokens: int) -> float:
    """Operations of the adapters in one forward pass over `num_tokens` tokens: a multiply-add for
    each of their parameters, of experts for those that a token is sent to."""
    layers = sum(lora.adapts_layer(index) for index in range(sizes.num_layers))
    return 2.0 * num_tokens * layers * _layer_parameters(lora, sizes, sizes.moe_router_topk)


def training_flops(
    forward: ForwardFlops,
    lora: LoraConfig | None,
    kind: str = "lm",
    has_reference: bool = False,
    vision: KnownVision | None = None,
) -> float:
    """Operations of forward and backward passes, and with `has_reference` of a reference model's
    forward pass; `forward` are those of the policy's forward pass, its adapters included.
    Recomputation is left out."""
    reference = (forward.total - forward.adapters) * has_reference
    linear, head = backward_passes(lora, kind)
    layers = (1 + linear) * forward.linear + 3 * (forward.attention + forward.adapters)
    images = forward.tower + forward.projector
    images += 0.0 if vision is None else vision.backward(forward)
    return layers + (1 + head) * forward.head + images + reference


def trained_parameters(
    model: ModelConfig,
    sizes: ModelSizes,
    parallel: ParallelConfig,
    lora: LoraConfig | None,
    vocab_size: int,
    stage: int,
) -> tuple[int, int]:
    """Parameters that a rank of pipeline stage `stage` trains: (all but those of experts, those of
    experts)."""
    if lora is None:
        return rank_parameters(model, sizes, parallel, vocab_size, stage)
    dense, experts = rank_adapters(model, sizes, parallel, lora, vocab_size, stage)
    return dense + _trained_head(model, sizes, parallel, stage), experts


def backward_passes(lora: LoraConfig | None, kind: str) -> tuple[int, int]:
    """Forward passes that backward costs: (of the matrices of layers, of the head)."""
    if lora is None:
        return 2, 2
    return 1, 2 if kind == "reward" or "lm_head" in (lora.modules_to_save or ()) else 1


def _layer_parameters(lora: LoraConfig, sizes: ModelSizes, num_experts: int) -> int:
    """Of the adapters of one layer, with those of `num_experts` experts."""
    return sum(
        matrix.parameters(lora.r or 0) * (num_experts if matrix.is_expert else 1)
        for matrix in adapted_matrices(lora, sizes)
    )


def _trained_head(
    model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig, stage: int
) -> int:
    """Parameters of a reward model's head on a rank of pipeline stage `stage`."""
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    return model.num_labels * sizes.hidden_size if model.kind == "reward" and is_last else 0
