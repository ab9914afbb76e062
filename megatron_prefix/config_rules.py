"""What the settings of a configuration must agree on, beyond each one's own type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from megatron_prefix.config import Config, DataConfig, ModelConfig, ParallelConfig

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
)
"""Settings of the model section that `model.hf` gives, and an imported `model.checkpoint`."""


def check_rules(config: Config, raw: dict[str, Any]) -> None:
    """Refuse settings that exclude each other or do not divide, all in one InputError.

    `raw` are the settings as given, before defaults.
    """
    faults = [*_data_faults(config.data), *_size_faults(raw.get("model"))]
    if not faults:
        faults = [*_model_faults(config.model), *_run_faults(config)]
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
    if model.num_layers is not None:
        yield from _shape_faults(model)
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
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    stages = parallel.pipeline_model_parallel_size
    together = model.recompute_num_layers
    if model.recompute_method == "uniform" and model.num_layers // (stages * chunks) % together:
        yield (
            f"model.recompute_num_layers = {together} does not divide the "
            f"{model.num_layers // (stages * chunks)} layers of a stage, which "
            "model.recompute_method: uniform needs: change it, or use block"
        )
    if model.num_layers % (stages * chunks):
        yield (
            f"model.num_layers = {model.num_layers} is not a multiple of "
            f"parallel.pipeline_model_parallel_size = {stages} x "
            f"parallel.virtual_pipeline_model_parallel_size = {chunks}"
        )


def _parallel_faults(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel: true shares tokens among tensor-parallel ranks, and "
            "parallel.tensor_model_parallel_size = 1: raise it, or leave sequence_parallel out"
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
