"""Leaf paths through Transformer Engine, which chooses flash-attn's or cuDNN's kernels.

Its `DotProductAttention` is called directly, with packed sequences of different lengths for
queries and keys and the mask `padding_causal_bottom_right`. (Megatron-Core's wrapper uses
`padding_causal`, aligned top-left, which is wrong for leaf paths.) The gathered keys exist only
during the call and are gathered again in backward. Their gradients are summed in float32 in a
fixed order. Written for Transformer Engine 2.9 and later.

The environment variables of Transformer Engine work as usual: `NVTE_FLASH_ATTN` and
`NVTE_FUSED_ATTN` choose kernels, `NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1` prints which one runs.

With deterministic algorithms on Hopper, Transformer Engine drops cuDNN's kernels for large rows. If
flash-attn is not installed, it then computes every score, without a message: refused here.

Sinks are the parameter `softmax_offset` of its module. They belong to the model's own attention
layer here, so a call lends them to the module, and their gradient goes to that layer. Of its
kernels only cuDNN's take them with packed sequences, and never deterministically. If these cannot
run, it computes every score, without a message: the known cases are refused here, too.

Shapes: L queries, S keys, S_kv gathered keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.func import functional_call

from megatron_prefix.attention.backends.backend import Backend, Scoring
from megatron_prefix.attention.backends.regather import KeyGather, KeysAndValues, attend_gathered
from megatron_prefix.attention.backends.requirements import head_dim_fault, why_not_on_cuda
from megatron_prefix.attention.plan import PathPlan
from megatron_prefix.errors import InputError

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8
MIN_CAPABILITY = (8, 0)
DETERMINISTIC_SCORES = 2**30
"""pieces x heads x longest queries x longest keys from which cuDNN is not used on Hopper with
deterministic algorithms (utils.get_attention_backend of Transformer Engine 2.20.2)."""
FLASH_ATTN = ("flash-attn", "flash-attn-3", "flash-attn-4")
SINKS_FROM = Version("2.12")
"""The first Transformer Engine that has sinks for packed sequences."""
SINKS_CUDNN = 91800
"""The first cuDNN that has them, as torch counts versions: 9.18.0."""

MakeKernel = Callable[[int, int, int, float, bool, bool], Callable[..., Tensor]]


def why_not_te(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """What prevents this backend, with the remedy; else None. Imports nothing."""
    return why_not_on_cuda(
        device,
        dtype,
        dtypes=DTYPES,
        capability=MIN_CAPABILITY,
        module="transformer_engine",
        remedy="`pip install transformer-engine[pytorch]` on a machine with CUDA, or use "
        "attention_backend flash",
    ) or head_dim_fault(head_dim, most=MAX_HEAD_DIM, multiple=HEAD_DIM_MULTIPLE)


def why_not_sinks() -> str | None:
    """What prevents sinks where the backend itself can run, with the remedy; else None."""
    version, cudnn = (
        importlib.metadata.version("transformer-engine"),
        torch.backends.cudnn.version(),
    )
    instead = "or use attention_backend flash, flex, path or auto"
    if Version(version) < SINKS_FROM:
        return (
            f"Transformer Engine {version} has no sinks (softmax_type) for packed sequences: "
            f"install {SINKS_FROM} or later, {instead}"
        )
    if cudnn is None or cudnn < SINKS_CUDNN:
        return (
            f"Transformer Engine takes sinks (softmax_type) with packed sequences from cuDNN 9.18 "
            f"on, and torch has {cudnn}: install a later one, {instead}"
        )
    return sinks_determinism_fault(torch.are_deterministic_algorithms_enabled())


def sinks_determinism_fault(is_deterministic: bool) -> str | None:
    """Why sinks cannot be computed, with the remedy; else None."""
    if not is_deterministic:
        return None
    return (
        "with torch's deterministic algorithms Transformer Engine drops cuDNN's kernels for sinks "
        "(softmax_type) and would compute every score: use attention_backend flash, flex, path or "
        "auto, or turn deterministic algorithms off"
    )


@functools.lru_cache(maxsize=16)
def transformer_engine(
    num_heads: int,
    num_groups: int,
    head_dim: int,
    scale: float,
    is_deterministic: bool,
    has_sinks: bool,
) -> Callable[..., Tensor]:
    """Transformer Engine's module for these sizes. It has no parameters but a place for sinks,
    which every call fills with its own.

    It reads torch's setting for deterministic algorithms when it is created, so each value of
    `is_deterministic` has a module of its own.
    """
    from transformer_engine.pytorch import DotProductAttention

    assert is_deterministic == torch.are_deterministic_algorithms_enabled()
    module = DotProductAttention(
        num_heads,
        head_dim,
        num_gqa_groups=num_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        attention_type="cross",
        softmax_scale=scale,
        softmax_type="learnable" if has_sinks else "vanilla",
    )
    return partial(with_sinks, module) if has_sinks else module


def with_sinks(module: torch.nn.Module, *, sinks: Tensor, **arguments: object) -> Tensor:
    """`module(**arguments)` with `sinks` [N] as its parameter, differentiable in them."""
    return functional_call(module, {"softmax_offset": sinks}, kwargs=arguments)


def determinism_fault(
    plan: PathPlan, num_heads: int, capability: tuple[int, int], has_flash_attn: bool
) -> str | None:
    """Why every score of this row would be computed, with the remedy; else None."""
    scores = len(plan.q_lengths) * num_heads * max(plan.max_seqlen_q, 2) * plan.max_seqlen_kv
    if has_flash_attn or capability != (9, 0) or scores < DETERMINISTIC_SCORES:
        return None
    return (
        f"model.attention_backend: te with torch's deterministic algorithms on compute capability "
        f"9.0: Transformer Engine drops cuDNN's kernels for {len(plan.q_lengths)} pieces x "
        f"{num_heads} heads x {plan.max_seqlen_q} queries x {plan.max_seqlen_kv} keys (2^30 or "
        "more) and would compute every score: install flash-attn, use attention_backend flash, or "
        "turn deterministic algorithms off"
    )


def has_flash_attn() -> bool:
    """Whether flash-attn is installed, of any version that Transformer Engine calls."""
    for name in FLASH_ATTN:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def te_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PathPlan,
    scoring: Scoring,
    make_kernel: MakeKernel = transformer_engine,
) -> Tensor:
    """Tree attention in one call of the kernel; arguments as `tree_attention` checks them.

    `make_kernel(heads, groups, head_dim, scale, is_deterministic, has_sinks)` returns a callable
    with the keyword arguments of Transformer Engine's module, and `sinks` if it has them; by
    default it is that module.
    """
    sinks = scoring.sinks
    if q.size(0) == 0:  # no kernel accepts an empty batch; the sum keeps all inputs in the graph
        return q + (k.sum() + v.sum()) + (0 if sinks is None else 0 * sinks.sum().to(q.dtype))
    assert scoring.softcap is None
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    if is_deterministic and q.is_cuda:
        capability = torch.cuda.get_device_capability(q.device)
        if fault := determinism_fault(plan, q.size(1), capability, has_flash_attn()):
            raise InputError(fault)
    if sinks is not None and (fault := sinks_determinism_fault(is_deterministic)):
        raise InputError(f"model.attention_backend: te: {fault}")
    sizes = q.size(1), k.size(1), q.size(2), scoring.scale, is_deterministic
    kernel = make_kernel(*sizes, sinks is not None)

    # keys before a query's own and after it, aligned bottom-right as the mask
    more: dict[str, Any] = {}
    if plan.window is not None:
        more["window_size"] = plan.window - 1, 0
    if sinks is not None:
        more["sinks"] = sinks

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = kernel(
            query_layer=q,
            key_layer=keys,
            value_layer=values,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_kv=plan.cu_seqlens_kv,
            # With 1, flash kernels use decoding code whose output backward does not expect.
            max_seqlen_q=max(plan.max_seqlen_q, 2),
            max_seqlen_kv=plan.max_seqlen_kv,
            pad_between_seqs=False,
            **more,
        )
        return out.view_as(q)  # [L, N * H]

    q, k, v = (x.contiguous() for x in (q, k, v))
    if plan.is_identity:
        return attend(q, k, v)
    sum_copies = functools.partial(plan.sum_copies, is_fused=scoring.fuses_sums)
    key_gather = KeyGather(gather=_both(plan.gather), scatter=_both(sum_copies))
    return attend_gathered(attend, q, k, v, key_gather)


def _both(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], KeysAndValues]:
    return lambda k, v: (function(k), function(v))


BACKEND = Backend(
    why_not=why_not_te,
    prepare=lambda plan: plan.path,
    attend=lambda q, k, v, plan, scoring: te_attention(q, k, v, plan.path, scoring),
    copies_keys=True,
    lacks={
        "softcap": "Transformer Engine has no soft cap (attn_logit_softcapping); use "
        "attention_backend flex, path or auto",
    },
    refuses={"sinks": why_not_sinks},
)
