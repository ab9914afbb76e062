"""Copies of numpy arrays to a device: to CUDA from pinned memory, without waiting."""

from __future__ import annotations

import numpy as np
import torch


def on_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A tensor with the array's values. On CPU it may share the array's memory.

    A copy to CUDA runs on the current stream, and the call returns before it has finished.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
