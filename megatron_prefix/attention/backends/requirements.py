"""What CUDA backends ask of a machine before they run there, each obstacle with its remedy."""

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
    """What keeps kernels for `dtypes` and this compute capability or a later one from running.

    `module` is what they are imported from, and `remedy` how to get it. Imports nothing, so that
    it costs nothing to ask. None where nothing is in the way.
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
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < capability:
        return (
            f"it needs compute capability {capability}, this device has {found}; use "
            "attention_backend path"
        )
    return None


def head_dim_fault(
    head_dim: int | None, *, most: int, multiple: int = 1, least: int = 1, kernels: str = "it"
) -> str | None:
    """What keeps `kernels` from this head dim, if one is given, with the remedy; else None."""
    if head_dim is None or (least <= head_dim <= most and head_dim % multiple == 0):
        return None
    form = f"that is a multiple of {multiple} and at most {most}"
    if multiple == 1:
        form = f"of {least} to {most}"
    return f"{kernels} needs a head dim {form}, got {head_dim}; use attention_backend path"
