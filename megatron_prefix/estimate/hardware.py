"""The hardware of a plan, as its flags name it, and whether a rank fits its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_prefix.config import ModelConfig
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.step_time import DEFAULT_MFU
from megatron_prefix.platform.gpus import GPUS, Gpu

GIB = 2**30
FIXED_GIB = 4.0
"""Of CUDA's context, NCCL's buffers and the kernels' workspace."""
FRAGMENTED = 0.06
"""Share of a GPU's memory that fragmentation takes."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """GPUs of one kind; without `gpu` only their memory is known."""

    memory_gib: float
    mfu: float = DEFAULT_MFU
    gpu: Gpu | None = None

    @property
    def usable_gib(self) -> float:
        """GiB that a run may fill; 79 GiB: 70.3."""
        return self.memory_gib * (1 - FRAGMENTED) - FIXED_GIB


def named_hardware(
    name: str | None, memory_gib: float | None = None, mfu: float | None = None
) -> Hardware | None:
    """From the values of `--gpu`, `--memory` and `--mfu`; None without the first two. Raises
    InputError for an unknown GPU or a value out of bounds."""
    if memory_gib is not None and not 6 <= memory_gib <= 4096:
        raise InputError(f"--memory is {memory_gib:g} GiB per GPU: give 6 to 4096")
    if mfu is not None and not 0.01 <= mfu <= 1:
        raise InputError(f"--mfu is {mfu:g}, a share of the GPU's peak: give 0.01 to 1")
    if name is None:
        if mfu is not None:
            raise InputError(f"--mfu is {mfu:g}, and no GPU is named: add --gpu, or remove --mfu")
        return None if memory_gib is None else Hardware(memory_gib=memory_gib)
    gpu = GPUS.get(name.upper())
    if gpu is None:
        raise InputError(f"--gpu is {name!r}, which is not known: give one of {', '.join(GPUS)}")
    given = gpu.memory_gib if memory_gib is None else memory_gib
    return Hardware(memory_gib=given, mfu=DEFAULT_MFU if mfu is None else mfu, gpu=gpu)


def check_dtype(machine: Hardware | None, model: ModelConfig) -> None:
    """Refuse to time what the table has no peak for."""
    if machine is not None and machine.gpu is not None and model.dtype != "bfloat16":
        raise InputError(
            f"model.dtype = {model.dtype} with --gpu {machine.gpu.name}: times are known for "
            "bfloat16; add model.dtype=bfloat16"
        )
    if machine is not None and machine.gpu is not None and model.fp8 is not None:
        raise InputError(
            f"model.fp8 = {model.fp8} with --gpu {machine.gpu.name}: times are known for bfloat16; "
            "remove model.fp8, or leave out --gpu"
        )


def fit(machine: Hardware, memory: dict[str, Any]) -> dict[str, Any]:
    """Whether the fullest rank of `memory` fits, and how much is left; in GiB."""
    needed = memory["stages"][memory["fullest_stage"]]["total"] / GIB
    return {
        "fits": needed <= machine.usable_gib,
        "needed_gib": needed,
        "usable_gib": machine.usable_gib,
        "memory_gib": machine.memory_gib,
        "margin_gib": machine.usable_gib - needed,
    }


def with_recomputation(model: ModelConfig, num_layers: int | None) -> ModelConfig:
    """The model with its first layers of every chunk recomputed: None or 0 for no layer."""
    if not num_layers:
        return replace(
            model,
            recompute_granularity=None,
            recompute_method=None,
            recompute_num_layers=None,
        )
    return replace(
        model,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=num_layers,
    )
