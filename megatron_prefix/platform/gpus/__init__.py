"""GPUs by name: peak, memory and links."""

from megatron_prefix.platform.gpus.table import GPUS, GPUS_PER_NODE, Gpu, peak_of_device

__all__ = ["GPUS", "GPUS_PER_NODE", "Gpu", "peak_of_device"]
