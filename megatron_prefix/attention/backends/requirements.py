"""Requirements of CUDA backends: what prevents one on a machine, with the remedy."""

from __future__ import annotations

import importlib.util

import torch


def why_not_on_cuda(
    device: torch.device,
    dtype: torch.dtype,
    *,
    dtypes: tuple[torch.dtype, ...],
    capability: tuple[int, int],
    module: str | None = None,
    remedy: str = "",
) -> str | None:
    """Why kernels for `dtypes` and compute capability `capability` or later cannot run, or None.

    `module` is the module that has the kernels, and `remedy` tells how to install it. Nothing is
    imported, so the check is fast.
    """
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}; use attention_backend path or auto"
    if dtype not in dtypes:
        names = ", ".join(str(x).removeprefix("torch.") for x in dtypes)
        return (
            f"its kernels compute in {names}, not in {dtype}; set dtype to bfloat16, "
            "or use attention_backend path"
        )
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{module} is not installed; {remedy}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check the driver, or use attention_backend path on CPU"
    available = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and available < capability:
        return (
            f"it needs compute capability {capability}, but this device has {available}; use "
            "attention_backend path"
        )
    return None


def head_dim_fault(
    head_dim: int | None, *, most: int, multiple: int = 1, least: int = 1, kernels: str = "it"
) -> str | None:
    """Why `kernels` cannot use this head dim, with the remedy; None if they can or it is None."""
    if head_dim is None or (least <= head_dim <= most and head_dim % multiple == 0):
        return None
    form = f"that is a multiple of {multiple} and at most {most}"
    if multiple == 1:
        form = f"of {least} to {most}"
    return f"{kernels} needs a head dim {form}, got {head_dim}; use attention_backend path"
