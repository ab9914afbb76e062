"""Process layout: its settings, and whether a model can be divided that way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import KNOWN_KEYS, Layers, Minutes, Processes, Switch
from megatron_prefix.config.fp8 import fp8_size_faults
from megatron_prefix.config.model import ModelConfig, ModelSizes
from megatron_prefix.errors import InputError


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class ParallelConfig:
    """Process layout. The processes that `torchrun` starts, divided by the product of the tensor,
    pipeline and context parallel sizes, are the data-parallel ranks."""

    tensor_model_parallel_size: Processes = 1
    """Ranks that share every layer's matrices."""
    sequence_parallel: Switch = False
    """Tensor-parallel ranks also share the tokens between those matrices."""
    pipeline_model_parallel_size: Processes = 1
    """Stages that follow one another."""
    virtual_pipeline_model_parallel_size: Layers | None = None
    """Chunks of layers that each stage holds, interleaved over the stages."""
    num_layers_in_first_pipeline_stage: Layers | None = None
    """Layers of the first stage, which also embeds; the other stages share the rest evenly."""
    num_layers_in_last_pipeline_stage: Layers | None = None
    """Layers of the last stage, which also projects to logits."""
    context_parallel_size: Processes = 1
    """Ranks that share the tokens of each row through all layers."""
    cp_comm: Literal["all_gather", "all_to_all", "needed_rows"] | None = None
    """How context-parallel ranks get keys. `needed_rows` (default): those on the root paths of
    their tokens; `all_gather`: all keys; `all_to_all`: all keys for a share of the heads."""
    expert_model_parallel_size: Processes = 1
    """Data-parallel ranks that share the experts of every layer."""
    use_distributed_optimizer: Switch = False
    """Each rank keeps its share of the optimizer's state (ZeRO stage 1)."""
    overlap_grad_reduce: Switch = False
    """Add gradients up over data-parallel ranks while backward still runs."""
    overlap_param_gather: Switch = False
    """With the distributed optimizer, gather updated weights while the next forward pass runs."""
    tp_comm_overlap: Switch = False
    """Overlap products of layers with the communication of tensor-parallel ranks, by Transformer
    Engine. Needs `sequence_parallel` and `data.pad_rows: capacity`; see docs/gpu.md."""
    gradient_accumulation_fusion: Switch = False
    """Add the gradients of weights to the float32 sums inside of their matrix products. Needs
    APEX's `fused_weight_gradient_mlp_cuda`."""
    distributed_timeout_minutes: Minutes = 30.0
    """Minutes without progress before all ranks stop and name the stalled one."""

    @property
    def row_multiple(self) -> int:
        """A row's length in tokens is a multiple of this: the number of ranks that share it."""
        slices = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return slices * self.context_parallel_size

    @property
    def count_multiple(self) -> int:
        """A rank's rows per step are a multiple of this: interleaved stages fill in turns."""
        is_interleaved = self.virtual_pipeline_model_parallel_size is not None
        return self.pipeline_model_parallel_size if is_interleaved else 1

    def faults(self, model: ModelConfig, sizes: ModelSizes) -> Iterator[str]:
        """Settings that exclude each other, and sizes of the model that they do not divide."""
        yield from parallel_faults(self)
        yield from layout_faults(model, sizes, self)

    def check_model(self, model: ModelConfig, sizes: ModelSizes) -> None:
        """Raise InputError, naming every fault, if the model cannot be divided this way."""
        if faults := list(layout_faults(model, sizes, self)):
            raise InputError("; ".join(faults))


def layout_faults(model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig) -> Iterator[str]:
    """Sizes that a layout does not divide, and settings that the model has no use for."""
    tensor = parallel.tensor_model_parallel_size
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if (value := getattr(sizes, key)) % tensor:
            yield (
                f"model.{key} = {value} is not a multiple of "
                f"parallel.tensor_model_parallel_size = {tensor}"
            )
    if model.fp8 is not None:
        yield from fp8_size_faults(model, sizes, tensor)
    heads = tensor * parallel.context_parallel_size
    if parallel.cp_comm == "all_to_all":
        for key in ("num_attention_heads", "num_query_groups"):
            if (value := getattr(sizes, key)) % heads:
                yield (
                    f"model.{key} = {value} is not a multiple of parallel.context_parallel_size = "
                    f"{parallel.context_parallel_size} x parallel.tensor_model_parallel_size = "
                    f"{tensor}, and parallel.cp_comm: all_to_all divides the heads by that: use "
                    "needed_rows or all_gather"
                )
    yield from _stage_faults(model, sizes, parallel)
    yield from _mixture_faults(model, sizes, parallel)


def _stage_faults(model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig) -> Iterator[str]:
    """Layers over pipeline stages and their chunks; the first and last may have their own count."""
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    named = {
        key: getattr(parallel, key)
        for key in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if getattr(parallel, key) is not None
    }
    given = "".join(f", parallel.{key} = {value}" for key, value in named.items())
    # 10 layers on 3 stages, the first has 2: 8 layers are left for 2 other stages, 4 for each
    others, left = stages - len(named), sizes.num_layers - sum(named.values())
    if named and others < 0 or left < others or (others == 0 and left):
        yield (
            f"model.num_layers = {sizes.num_layers} cannot be divided with "
            f"parallel.pipeline_model_parallel_size = {stages}{given}: every stage needs a layer, "
            "and every layer a stage"
        )
        return
    counts = [*named.values(), *([left // others] if others else [])]
    if (others and left % others) or any(count % chunks for count in counts):
        yield (
            f"model.num_layers = {sizes.num_layers} is not a multiple of "
            f"parallel.pipeline_model_parallel_size = {stages} x "
            f"parallel.virtual_pipeline_model_parallel_size = {chunks}"
            + (f", nor are the parts left by{given[1:]}" if named else "")
        )
        return
    # uniform recomputation cuts each chunk of layers into blocks of equal length
    together = model.recompute_num_layers
    if model.recompute_method == "uniform" and together is not None:
        for count in counts:
            if count // chunks % together:
                yield (
                    f"model.recompute_num_layers = {together} does not divide the "
                    f"{count // chunks} layers of a stage, which model.recompute_method: uniform "
                    "needs: change it, or use block"
                )


def _mixture_faults(
    model: ModelConfig, sizes: ModelSizes, parallel: ParallelConfig
) -> Iterator[str]:
    """Experts over ranks, and settings for experts of a model without any."""
    experts, ranks = sizes.num_moe_experts, parallel.expert_model_parallel_size
    tensor = parallel.tensor_model_parallel_size
    if not experts:
        for key in ("moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax"):
            if (value := getattr(model, key)) != getattr(ModelConfig, key):
                yield f"model.{key} = {value} without model.num_moe_experts: give both, or neither"
        if ranks > 1 or model.moe_aux_loss_coeff:
            yield (
                f"parallel.expert_model_parallel_size = {ranks} and model.moe_aux_loss_coeff = "
                f"{model.moe_aux_loss_coeff} are for models with experts, and this one has none: "
                "leave them out"
            )
        return
    if experts % ranks:
        yield (
            f"model.num_moe_experts = {experts} is not a multiple of "
            f"parallel.expert_model_parallel_size = {ranks}"
        )
    if sizes.moe_ffn_hidden_size % tensor:
        yield (
            f"model.moe_ffn_hidden_size = {sizes.moe_ffn_hidden_size} is not a multiple of "
            f"parallel.tensor_model_parallel_size = {tensor}"
        )
    if (shared := sizes.architecture.shared_expert_size) % tensor:
        yield (
            f"the shared expert of {shared} channels cannot be divided by "
            f"parallel.tensor_model_parallel_size = {tensor}"
        )
    if sizes.moe_router_topk > experts:
        yield (
            f"model.moe_router_topk = {sizes.moe_router_topk} is above "
            f"model.num_moe_experts = {experts}"
        )
    if sizes.moe_router_topk == 1 and not sizes.moe_router_pre_softmax:
        yield (
            "model.moe_router_topk = 1 without model.moe_router_pre_softmax gives the one chosen "
            "expert the weight 1, so its router would never learn: set moe_router_pre_softmax: true"
        )
    if parallel.tp_comm_overlap:
        yield (
            f"parallel.tp_comm_overlap = True with model.num_moe_experts = {experts}: each rank's "
            "experts get another number of tokens in every row: remove it"
        )
    if tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.tensor_model_parallel_size = {tensor} with model.num_moe_experts = "
            f"{experts} needs parallel.sequence_parallel: true; without it every rank would send "
            "all tokens to the experts"
        )


def parallel_faults(parallel: ParallelConfig) -> Iterator[str]:
    """Settings of a layout that exclude each other, whatever the model."""
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel: true shares tokens among tensor-parallel ranks, and "
            "parallel.tensor_model_parallel_size = 1: raise it, or leave sequence_parallel out"
        )
    if parallel.tp_comm_overlap and not parallel.sequence_parallel:
        yield (
            "parallel.tp_comm_overlap = True overlaps the communication of sequence parallelism: "
            "set parallel.sequence_parallel: true and a parallel.tensor_model_parallel_size above "
            "1, or remove it"
        )
    if parallel.cp_comm is not None and parallel.context_parallel_size == 1:
        yield (
            f"parallel.cp_comm = {parallel.cp_comm} has no effect while "
            "parallel.context_parallel_size = 1: raise the size, or leave cp_comm out"
        )
    if parallel.pipeline_model_parallel_size == 1:
        for key in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            if getattr(parallel, key) is not None:
                yield (
                    f"parallel.{key} = {getattr(parallel, key)} with "
                    "parallel.pipeline_model_parallel_size = 1: there is one stage; leave it out"
                )
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather: true gathers what the distributed optimizer updated: "
            "set parallel.use_distributed_optimizer and parallel.overlap_grad_reduce too"
        )
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and (chunks == 1 or parallel.pipeline_model_parallel_size == 1):
        yield (
            f"parallel.virtual_pipeline_model_parallel_size = {chunks} with "
            f"parallel.pipeline_model_parallel_size = {parallel.pipeline_model_parallel_size}: "
            "interleaving needs two chunks and two stages or more; leave it out"
        )
