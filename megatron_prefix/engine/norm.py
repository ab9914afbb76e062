"""The norm of a model's gradients, read from the device once.

If neither Transformer Engine nor Apex is installed, Megatron-Core reads the norm of every parameter
from the device by itself, and the host waits each time. Here the norms stay on the device until the
last one. The result has the same bits.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from torch import Tensor

from megatron_prefix.platform import gradients_for_norm


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Norm over all parameters of the model of gradients that `prepare_grads` prepared."""
    if HAVE_APEX_OR_TE:  # their kernels read nothing from the device
        return float(optimizer.get_grad_norm())
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    groups = [part.get_grad_stats_parallel_group() for part in parts]
    gradients = [gradients_for_norm(part) for part in parts]
    if all(group == groups[0] for group in groups):
        return _norm([x for part in gradients for x in part], groups[0])
    # ranks share experts: parts of norm 3 and 4 have norm 5
    norms = [_norm(own, group) for own, group in zip(gradients, groups, strict=True)]
    return math.sqrt(sum(norm**2 for norm in norms))


def _norm(gradients: list[Tensor], group: dist.ProcessGroup) -> float:
    square = torch.zeros(1, dtype=torch.float, device="cuda")
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        square = torch.linalg.vector_norm(norms).float().reshape(1) ** 2.0
    dist.all_reduce(square, group=group)
    return square.item() ** 0.5
