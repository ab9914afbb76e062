"""What the settings of a configuration must agree on, beyond each one's own type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_prefix.config.kinds import kind_faults
from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from megatron_prefix.config.schema import Config, DataConfig, ModelConfig, ParallelConfig

REQUIRED_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
SIZES = (
    *REQUIRED_SIZES,
    "num_query_groups",
    "kv_channels",
    "rotary_base",
    "rope_scaling",
    "norm_epsilon",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
)
"""Settings of the model section that `model.hf` gives, and an imported `model.checkpoint`."""


def check_rules(config: Config, raw: dict[str, Any]) -> None:
    """Refuse settings that exclude each other or do not divide, all in one InputError.

    `raw` are the settings as given, before defaults.
    """
    faults = [*_data_faults(config.data), *_size_faults(raw.get("model"))]
    if not faults:
        faults = [*_model_faults(config.model), *_run_faults(config), *kind_faults(config, raw)]
        faults += _parallel_faults(config.parallel)
    if not faults and config.model.num_layers is not None:
        faults = list(layout_faults(config.model, config.parallel))
    if faults:
        raise InputError("; ".join(faults))


def _data_faults(data: DataConfig) -> Iterator[str]:
    if data.packing and data.row_capacity is None:
        yield "data.row_capacity is missing: packing needs the size of a row in tokens"
    if data.packing and data.micro_batch_size is not None:
        yield (
            f"data.micro_batch_size = {data.micro_batch_size} counts only without packing: "
            "remove it, or set data.packing: false"
        )
    if not data.packing and data.micro_batch_size is None:
        yield "data.micro_batch_size is missing: data.packing: false needs it"
    if not data.packing and data.rows_per_step is not None:
        yield (
            f"data.rows_per_step = {data.rows_per_step} counts packed rows: "
            "set data.packing: true, or use data.global_batch_size"
        )
    if not data.packing and (data.plan is not None or data.packing_method != "first-fit"):
        yield (
            f"data.plan = {data.plan} and data.packing_method = {data.packing_method} are for "
            "packed rows: set data.packing: true, or leave them out"
        )
    if (data.global_batch_size is None) == (data.rows_per_step is None):
        yield (
            f"data.global_batch_size = {data.global_batch_size} and "
            f"data.rows_per_step = {data.rows_per_step}: give exactly one"
        )


def _size_faults(raw: object) -> Iterator[str]:
    """Sizes beside `model.hf`, or neither."""
    if not isinstance(raw, dict):
        return
    if raw.get("hf") is not None:
        for key in (*SIZES, "checkpoint"):
            if raw.get(key) is not None:
                yield (
                    f"model.{key} = {raw[key]!r} beside model.hf = {raw['hf']!r}, which sets it: "
                    "remove one"
                )
        return
    given = [key for key in SIZES if raw.get(key) is not None]
    if raw.get("checkpoint") is not None and not given:
        return  # an imported checkpoint has them
    missing = [key for key in REQUIRED_SIZES if key not in given]
    if missing:
        yield f"model.{missing[0]} is missing: give the model's sizes, or model.hf"


def _model_faults(model: ModelConfig) -> Iterator[str]:
    scaling = model.rope_scaling
    if scaling is not None:
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if (getattr(scaling, key) is not None) != (scaling.type == "llama3"):
                yield (
                    f"model.rope_scaling.{key} = {getattr(scaling, key)}: needed with type "
                    "llama3, and only there"
                )
    if model.flash_version != "auto" and model.attention_backend != "flash":
        yield (
            f"model.flash_version = {model.flash_version} counts only with "
            f"model.attention_backend: flash, which is {model.attention_backend}: leave it out"
        )
    if model.num_layers is not None:
        yield from _shape_faults(model)
    if model.moe_count != "tokens" and not model.moe_aux_loss_coeff:
        yield (
            f"model.moe_count = {model.moe_count} says what the auxiliary loss counts, and "
            "model.moe_aux_loss_coeff = 0.0 gives it no weight: set one, or leave both out"
        )
    recomputed = model.recompute_num_layers
    if recomputed is not None and model.num_layers is not None and recomputed > model.num_layers:
        yield f"model.recompute_num_layers = {recomputed} is above num_layers = {model.num_layers}"
    full = model.recompute_granularity == "full"
    for key in ("recompute_method", "recompute_num_layers"):
        if (getattr(model, key) is not None) != full:
            yield (
                f"model.{key} = {getattr(model, key)}: needed with "
                "model.recompute_granularity: full, and only there"
            )


def _shape_faults(model: ModelConfig) -> Iterator[str]:
    heads, groups = model.num_attention_heads, model.num_query_groups
    if groups and heads % groups:
        yield (
            f"model.num_attention_heads = {heads} is not a multiple of "
            f"model.num_query_groups = {groups}"
        )
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.hidden_size = {model.hidden_size} is not a multiple of "
            f"model.num_attention_heads = {heads}: change one, or set model.kv_channels"
        )
    elif (model.kv_channels or model.hidden_size // heads) % 2:
        yield (
            f"a head of {model.kv_channels or model.hidden_size // heads} channels is odd and "
            "rotary embedding rotates pairs: change model.hidden_size or model.kv_channels"
        )


def layout_faults(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What a model with known sizes cannot be divided into."""
    tensor = parallel.tensor_model_parallel_size
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, key) or model.num_attention_heads
        if value % tensor:
            yield (
                f"model.{key} = {value} is not a multiple of "
                f"parallel.tensor_model_parallel_size = {tensor}"
            )
    heads = tensor * parallel.context_parallel_size
    if parallel.cp_comm == "all_to_all":
        for key in ("num_attention_heads", "num_query_groups"):
            value = getattr(model, key) or model.num_attention_heads
            if value % heads:
                yield (
                    f"model.{key} = {value} is not a multiple of parallel.context_parallel_size = "
                    f"{parallel.context_parallel_size} x parallel.tensor_model_parallel_size = "
                    f"{tensor}, which parallel.cp_comm: all_to_all divides heads by: use "
                    "needed_rows or all_gather"
                )
    yield from _stage_faults(model, parallel)
    yield from _mixture_faults(model, parallel)


def world_faults(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """A number of processes that the sizes do not divide."""
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {key: getattr(parallel, key) for key in keys}
    model_size = math.prod(sizes.values())
    if world_size % model_size:
        named = " x ".join(f"parallel.{key} = {value}" for key, value in sizes.items())
        yield (
            f"{world_size} processes were started, and {named} asks for a multiple of {model_size}"
        )
        return
    experts = parallel.expert_model_parallel_size
    stages = model_size // parallel.context_parallel_size
    if world_size % (stages * experts):
        yield (
            f"{world_size} processes were started, and parallel.expert_model_parallel_size = "
            f"{experts} shares experts among the data- and context-parallel ranks: with {stages} "
            f"processes for each of them it asks for a multiple of {stages * experts}"
        )


def _stage_faults(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Layers over pipeline stages and their chunks; the first and last may have their own count."""
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    named = {
        key: getattr(parallel, key)
        for key in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if getattr(parallel, key) is not None
    }
    given = "".join(f", parallel.{key} = {value}" for key, value in named.items())
    others, left = stages - len(named), model.num_layers - sum(named.values())
    if named and others < 0 or left < others or (others == 0 and left):
        yield (
            f"model.num_layers = {model.num_layers} cannot be divided with "
            f"parallel.pipeline_model_parallel_size = {stages}{given}: every stage needs a layer, "
            "and every layer a stage"
        )
        return
    counts = [*named.values(), *([left // others] if others else [])]
    if (others and left % others) or any(count % chunks for count in counts):
        yield (
            f"model.num_layers = {model.num_layers} is not a multiple of "
            f"parallel.pipeline_model_parallel_size = {stages} x "
            f"parallel.virtual_pipeline_model_parallel_size = {chunks}"
            + (f", nor are the parts left by{given[1:]}" if named else "")
        )
        return
    together = model.recompute_num_layers
    for count in counts:
        if model.recompute_method == "uniform" and count // chunks % together:
            yield (
                f"model.recompute_num_layers = {together} does not divide the {count // chunks} "
                "layers of a stage, which model.recompute_method: uniform needs: change it, or "
                "use block"
            )


def _mixture_faults(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    experts, ranks = model.num_moe_experts, parallel.expert_model_parallel_size
    tensor = parallel.tensor_model_parallel_size
    if experts is None:
        unused = {
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": None,
            "moe_router_pre_softmax": False,
        }
        for key, default in unused.items():
            if (value := getattr(model, key)) != default:
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
    if (model.moe_ffn_hidden_size or model.ffn_hidden_size) % tensor:
        yield (
            f"model.moe_ffn_hidden_size = {model.moe_ffn_hidden_size} is not a multiple of "
            f"parallel.tensor_model_parallel_size = {tensor}"
        )
    if model.moe_router_topk > experts:
        yield (
            f"model.moe_router_topk = {model.moe_router_topk} is above "
            f"model.num_moe_experts = {experts}"
        )
    if model.moe_router_topk == 1 and not model.moe_router_pre_softmax:
        yield (
            "model.moe_router_topk = 1 without model.moe_router_pre_softmax weighs the one chosen "
            "expert with 1, and its router would never learn: set moe_router_pre_softmax: true"
        )
    if tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.tensor_model_parallel_size = {tensor} with model.num_moe_experts = "
            f"{experts} needs parallel.sequence_parallel: true, without which every rank would "
            "send all tokens to the experts"
        )


def _parallel_faults(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel: true shares tokens among tensor-parallel ranks, and "
            "parallel.tensor_model_parallel_size = 1: raise it, or leave sequence_parallel out"
        )
    if parallel.cp_comm is not None and parallel.context_parallel_size == 1:
        yield (
            f"parallel.cp_comm = {parallel.cp_comm} with parallel.context_parallel_size = 1: it "
            "counts for rows that several ranks share; raise the size, or leave cp_comm out"
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


def _run_faults(config: Config) -> Iterator[str]:
    train, optimizer, loss = config.train, config.optimizer, config.loss
    if (loss.reference == "precomputed") != (loss.ref_logps is not None):
        yield (
            f"loss.ref_logps = {loss.ref_logps}: needed with loss.reference: precomputed, "
            "and only there"
        )
    if (train.steps is None) == (train.epochs is None):
        yield f"train.steps = {train.steps} and train.epochs = {train.epochs}: give exactly one"
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}"
    if train.save_interval is not None and train.save is None:
        yield "train.save_interval is set but train.save is not: name a directory"
    if train.eval_interval is not None and config.data.valid is None:
        yield "train.eval_interval is set but data.valid is not: name a data set"
