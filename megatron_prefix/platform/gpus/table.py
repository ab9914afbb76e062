"""GPUs by name: peak, memory and links, from the makers' data sheets.

`bf16_flops` is the dense peak: data sheets print twice as much, "with sparsity". `nvlink` and
`network` are in one direction: data sheets add both directions. `memory_gib` is what a program
finds as the total of a device, rounded down; it is less than the data sheet's gigabytes.

    H100   NVIDIA H100 Tensor Core GPU, data sheet, column H100 SXM: 1,979 TFLOPS with sparsity,
           80 GB, 3.35 TB/s, NVLink 900 GB/s
    H200   NVIDIA H200 Tensor Core GPU, data sheet, column H200 SXM: 1,979 TFLOPS with sparsity,
           141 GB, 4.8 TB/s, NVLink 900 GB/s
    B200   NVIDIA Blackwell, architecture brief, HGX B200: 4,500 TFLOPS with sparsity, NVLink
           1.8 TB/s; NVIDIA DGX B200, data sheet: 1,440 GB and 64 TB/s for 8 GPUs
    A100   NVIDIA A100 Tensor Core GPU, data sheet, column A100 80GB SXM: 312 TFLOPS dense, 80 GB,
           2,039 GB/s, NVLink 600 GB/s

Network, per GPU: DGX H100, H200 and B200 user guides: 8 adapters of 400 Gbit/s for 8 GPUs; DGX A100
user guide: 8 of 200 Gbit/s. Nodes have 8 GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

GPUS_PER_NODE = 8
"""GPUs that NVLink connects."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: operations and bytes per second, memory in GiB."""

    name: str
    bf16_flops: float
    memory_gib: float
    memory_bandwidth: float
    nvlink: float
    network: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="H100",
            bf16_flops=989.5e12,
            memory_gib=79,
            memory_bandwidth=3.35e12,
            nvlink=450e9,
            network=50e9,
        ),
        Gpu(
            name="H200",
            bf16_flops=989.5e12,
            memory_gib=139,
            memory_bandwidth=4.8e12,
            nvlink=450e9,
            network=50e9,
        ),
        Gpu(
            name="B200",
            bf16_flops=2250e12,
            memory_gib=178,
            memory_bandwidth=8e12,
            nvlink=900e9,
            network=50e9,
        ),
        Gpu(
            name="A100",
            bf16_flops=312e12,
            memory_gib=79,
            memory_bandwidth=2.039e12,
            nvlink=300e9,
            network=25e9,
        ),
    )
}


DEVICES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA A100-SXM4-80GB": "A100",
}
"""Names that a driver gives the devices of the table; other variants have other peaks."""


def peak_of_device(name: str) -> float | None:
    """Dense bfloat16 operations per second of a device by its driver's name, if it is known."""
    return GPUS[DEVICES[name]].bf16_flops if name in DEVICES else None
