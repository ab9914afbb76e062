"""Leaf paths in one call of torch's variable-length flash kernel: the fast backend on CUDA.

`aten::_flash_attention_forward` gets the whole plan, with different sequence lengths for queries
and keys. Its causal mask is aligned bottom-right, which on leaf paths is tree attention. The
gathered keys exist only during the call: backward keeps q, k and v before the gather, the output
and the log-sum-exp. It gathers again, and sums the gradients of copies in float32 in a fixed
order.

A sliding window is an argument of the kernels. Sinks follow from the log-sum-exp (sinks.py).

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

from megatron_prefix.attention.backends.backend import Backend, Scoring
from megatron_prefix.attention.backends.flash_versions import active_version
from megatron_prefix.attention.backends.requirements import head_dim_fault, why_not_on_cuda
from megatron_prefix.attention.backends.sinks import add_sinks, sink_gradient
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
    scoring: Scoring,
    operators: Operators | None = None,
) -> torch.Tensor:
    """Tree attention in one kernel call; arguments as `tree_attention` checks them.

    `operators` are torch's kernels by default.
    """
    sinks = scoring.sinks
    if q.size(0) == 0:  # no kernel accepts an empty batch; the sum keeps all inputs in the graph
        return q + (k.sum() + v.sum()) + (0 if sinks is None else 0 * sinks.sum().to(q.dtype))
    assert scoring.softcap is None
    operators = operators or aten_operators()
    return _FlashPathAttention.apply(q, k, v, sinks, plan, scoring, operators)


class _FlashPathAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, scoring, operators):
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
            plan.window is None,  # causal, aligned bottom-right
            False,  # no debug mask
            scale=scoring.scale,
            **_window(plan),
        )
        if sinks is not None:
            out, lse_LN = add_sinks(out, lse.T, sinks)
            lse = lse_LN.T.contiguous()
        ctx.save_for_backward(q, k, v, out, lse, sinks, rng_state, unused)
        ctx.plan, ctx.scoring, ctx.operators = plan, scoring._replace(sinks=None), operators
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, sinks, rng_state, unused = ctx.saved_tensors
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
            plan.window is None,
            rng_state,
            unused,
            scale=ctx.scoring.scale,
            **_window(plan),
        )
        d_sinks = None if sinks is None else sink_gradient(grad_out, out, lse.T, sinks)
        dk, dv = (plan.sum_copies(x, ctx.scoring.fuses_sums) for x in (dk, dv))
        return dq, dk, dv, d_sinks, None, None, None


def _window(plan: PathPlan) -> dict[str, int]:
    """The kernels' arguments for a sliding window: keys before a query's own, and after it. They
    align it bottom-right, as the causal mask, which it contains."""
    if plan.window is None:
        return {}
    return {"window_size_left": plan.window - 1, "window_size_right": 0}


def _max_seqlen_q(plan: PathPlan) -> int:
    """The launch bound on queries per piece, at least 2.

    With 1 the forward kernel uses its decoding code, which regroups the query heads and returns
    the log-sum-exp in a layout that backward does not expect.
    """
    return max(plan.max_seqlen_q, 2)


BACKEND = Backend(
    why_not=why_not_flash,
    prepare=lambda plan: plan.path,
    attend=lambda q, k, v, plan, scoring: flash_attention(q, k, v, plan.path, scoring),
    copies_keys=True,
    lacks={
        "softcap": "torch's flash kernels have no soft cap (attn_logit_softcapping); use "
        "attention_backend flex, path or auto"
    },
)
