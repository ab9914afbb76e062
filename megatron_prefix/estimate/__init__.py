"""What a run will need, before it has a GPU: memory, operations, time, and whether sharing pays."""

from megatron_prefix.estimate.adapters import adapter_flops, training_flops
from megatron_prefix.estimate.flops import ForwardFlops, forward_flops
from megatron_prefix.estimate.hardware import Hardware, named_hardware
from megatron_prefix.estimate.planning import plan_run
from megatron_prefix.estimate.search import search_layouts

__all__ = [
    "ForwardFlops",
    "Hardware",
    "adapter_flops",
    "forward_flops",
    "named_hardware",
    "plan_run",
    "search_layouts",
    "training_flops",
]
