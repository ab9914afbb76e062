"""Host arrays -> tensors on a device; to CUDA from pinned memory, so that nobody waits."""

from __future__ import annotations

import numpy as np
import torch


def on_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A tensor of the array's values; on CPU it may share the array's memory.

    To CUDA the copy is put on the current stream, and the call returns before it is done.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
