"""Leaf paths in one call of torch's variable-length flash kernel: the fast backend on CUDA.

`aten::_flash_attention_forward` gets the whole plan, with different sequence lengths for queries
and keys. Its causal mask is aligned bottom-right, which on leaf paths is tree attention. The
gathered keys exist only during the call: backward keeps q, k and v before the gather, the output
and the log-sum-exp. It gathers again, and sums the gradients of copies in float32 in a fixed
order.

The same operators call FlashAttention-3 or -4 inside the context of flash_versions.py. With
`torch.use_deterministic_algorithms(True)`, which the kernels obey, gradients have the same bits
every time. Without it, kernels add dQ with atomic operations. dK and dV have the same bits every
time with FlashAttention-2; other versions may add the query heads of a group in any order.

Shapes: T tokens, T_kv gathered keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_prefix.attention.backends.backend import Backend
from megatron_prefix.attention.backends.flash_versions import active_version
from megatron_prefix.attention.backends.requirements import head_dim_fault, why_not_on_cuda
from megatron_prefix.attention.plan import PathPlan

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = {2: 256, 3: 256, 4: 128}
"""By the version of FlashAttention that the operators call."""
HEAD_DIM_MULTIPLE = 8
MIN_CAPABILITY = (8, 0)


class Operators(NamedTuple):
    """The two kernels, with the arguments of `aten::_flash_attention_forward` and `_backward`."""

    forward: Callable
    backward: Callable


def aten_operators() -> Operators:
    """torch's kernels. The positional arguments used here are the same from torch 2.8 to 2.13."""
    return Operators(
        torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    )


def why_not_flash(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """What prevents this backend on `device` in `dtype`, with the remedy; else None."""
    if obstacle := why_not_on_cuda(device, dtype, dtypes=DTYPES, capability=MIN_CAPABILITY):
        return obstacle
    if torch.version.hip is None and not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash kernels; install one that has, or use path"
    return why_not_head_dim(head_dim, active_version())


def why_not_head_dim(head_dim: int | None, version: int = 2) -> str | None:
    """Why FlashAttention `version` cannot use this head dim, with the remedy; else None."""
    return head_dim_fault(
        head_dim,
        most=MAX_HEAD_DIM[version],
        multiple=HEAD_DIM_MULTIPLE,
        kernels=f"FlashAttention-{version}",
    )


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: PathPlan,
    scale: float,
    operators: Operators | None = None,
) -> torch.Tensor:
    """Tree attention in one kernel call; arguments as `tree_attention` checks them.

    `operators` are torch's kernels by default.
    """
    if q.size(0) == 0:  # no kernel accepts an empty batch; the sum keeps all three in the graph
        return q + (k.sum() + v.sum())
    return _FlashPathAttention.apply(q, k, v, plan, scale, operators or aten_operators())


class _FlashPathAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, operators):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse, rng_state, unused, _ = operators.forward(
            q,
            plan.gather(k),
            plan.gather(v),
            plan.cu_seqlens_q,
            plan.cu_seqlens_kv,
            _max_seqlen_q(plan),
            plan.max_seqlen_kv,
            0.0,  # dropout
            True,  # causal, aligned bottom-right
            False,  # no debug mask
            scale=scale,
        )
        ctx.save_for_backward(q, k, v, out, lse, rng_state, unused)
        ctx.plan, ctx.scale, ctx.operators = plan, scale, operators
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, rng_state, unused = ctx.saved_tensors
        plan = ctx.plan
        dq, dk, dv = ctx.operators.backward(
            grad_out,
            q,
            plan.gather(k),
            plan.gather(v),
            out,
            lse,
            plan.cu_seqlens_q,
            plan.cu_seqlens_kv,
            _max_seqlen_q(plan),
            plan.max_seqlen_kv,
            0.0,
            True,
            rng_state,
            unused,
            scale=ctx.scale,
        )
        return dq, plan.sum_copies(dk), plan.sum_copies(dv), None, None, None


def _max_seqlen_q(plan: PathPlan) -> int:
    """The launch bound on queries per piece, at least 2.

    With 1 the forward kernel uses its decoding code, which regroups the query heads and returns
    the log-sum-exp in a layout that backward does not expect.
    """
    return max(plan.max_seqlen_q, 2)


BACKEND = Backend(
    why_not=why_not_flash,
    prepare=lambda plan: plan.path,
    attend=lambda q, k, v, plan, scale: flash_attention(q, k, v, plan.path, scale),
)
