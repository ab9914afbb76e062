"""The layouts that a number of GPUs allows, and the settings of memory that each may take.

A layout has a tensor, pipeline, virtual pipeline, context and expert parallel size; the rest is
data parallelism. What else follows from them:

    sequence parallelism      with tensor parallelism, of which it divides the activations
    distributed optimizer     if several ranks share it: less memory, and no more bytes
    both overlaps             with the distributed optimizer

Only layouts without faults are given: those of the sizes, of the model and of the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_prefix.config import Config, ModelConfig, ModelSizes, ParallelConfig
from megatron_prefix.distributed import world_faults
from megatron_prefix.estimate.hardware import with_recomputation
from megatron_prefix.estimate.memory import stage_layers

MOST_CONTEXT = 64
"""Context-parallel ranks that are tried."""
ROW_FACTORS = (0.5, 1, 2, 4)
"""What is tried of the configuration's row capacity, or of its sequences per micro batch."""


PARALLEL_KEYS = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "context_parallel_size",
    "cp_comm",
    "expert_model_parallel_size",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
)
RECOMPUTE_KEYS = ("recompute_granularity", "recompute_method", "recompute_num_layers")


def chosen_settings(config: Config) -> dict[str, Any]:
    """The settings that a search chooses, by dotted name."""
    chosen = (
        ("parallel", PARALLEL_KEYS),
        ("data", ("row_capacity", "micro_batch_size")),
        ("model", RECOMPUTE_KEYS),
    )
    return {
        f"{section}.{key}": getattr(getattr(config, section), key)
        for section, keys in chosen
        for key in keys
    }


def parallel_layouts(
    world_size: int, model: ModelConfig, sizes: ModelSizes, base: ParallelConfig
) -> Iterator[ParallelConfig]:
    """All layouts of `world_size` processes without a fault. The way in which keys travel and the
    time limit are those of `base`; layers of the first and last stage are shared evenly."""
    plain = with_recomputation(model, None)
    for tensor in divisors(world_size):
        narrow = ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
        if any(narrow.faults(plain, sizes)):
            continue
        for stages in divisors(world_size // tensor):
            if sizes.num_layers % stages:
                continue
            ranks = world_size // (tensor * stages)
            for context in divisors(ranks):
                if context > MOST_CONTEXT:
                    break
                for experts in divisors(ranks) if sizes.num_moe_experts else (1,):
                    for chunks in _chunks(sizes.num_layers, stages):
                        layout = replace(
                            base,
                            tensor_model_parallel_size=tensor,
                            sequence_parallel=tensor > 1,
                            pipeline_model_parallel_size=stages,
                            virtual_pipeline_model_parallel_size=chunks,
                            num_layers_in_first_pipeline_stage=None,
                            num_layers_in_last_pipeline_stage=None,
                            context_parallel_size=context,
                            cp_comm=base.cp_comm if context > 1 else None,
                            expert_model_parallel_size=experts,
                            use_distributed_optimizer=ranks > 1,
                            overlap_grad_reduce=ranks > 1,
                            overlap_param_gather=ranks > 1,
                        )
                        faults = (*layout.faults(plain, sizes), *world_faults(layout, world_size))
                        if not faults:
                            yield layout


def row_sizes(config: Config) -> list[Config]:
    """The configuration with other sizes of rows; alone if they are not free to change. Packing
    alters no result, but a plan on disk has its rows, `rows_per_step` counts them, and an auxiliary
    loss of experts depends on them."""
    data = config.data
    if data.plan is not None or data.rows_per_step is not None or config.model.moe_aux_loss_coeff:
        return [config]
    if data.packing:
        assert data.row_capacity is not None, "packing has one"
        rows = [replace(data, row_capacity=size) for size in _around(data.row_capacity)]
    else:
        assert data.micro_batch_size is not None, "needed without packing"
        rows = [replace(data, micro_batch_size=size) for size in _around(data.micro_batch_size)]
    return [replace(config, data=own) for own in rows]


def _around(size: int) -> list[int]:
    return sorted({int(size * factor) for factor in ROW_FACTORS} - {0})


def recomputations(model: ModelConfig, layers: int) -> list[ModelConfig]:
    """The model with none, 1, 2, … of the `layers` of a chunk recomputed: ever more time, and from
    the second on ever less memory. Then blocks of several layers, which take no more time."""
    # 4 layers: none, block 1 to 4, and uniform blocks of 2 and 4
    by_block = [with_recomputation(model, count) for count in range(layers + 1)]
    uniform = [
        replace(
            model,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=count,
        )
        for count in divisors(layers)[1:]
    ]
    return by_block + uniform


def chunk_layers(sizes: ModelSizes, parallel: ParallelConfig) -> int:
    """Layers of a chunk, the same on every stage of a layout that shares them evenly."""
    layers = stage_layers(sizes.num_layers, parallel)[0]
    return layers // (parallel.virtual_pipeline_model_parallel_size or 1)


def divisors(number: int) -> list[int]:
    """All divisors in ascending order; 12: [1, 2, 3, 4, 6, 12]."""
    small = [x for x in range(1, int(number**0.5) + 1) if number % x == 0]
    return small + [number // x for x in reversed(small) if x * x != number]


def _chunks(num_layers: int, stages: int) -> list[int | None]:
    if stages == 1:
        return [None]
    return [None, *divisors(num_layers // stages)[1:]]
