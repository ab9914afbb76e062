"""The one entrance to attention over trees: check, choose, dispatch.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch

from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.layout import TreeLayout

BACKENDS = ("auto", "dense", "path", "flash")


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that `name` stands for on `device` in `dtype`: dense, path or flash.

    `auto` is flash where its kernels run (CUDA in bfloat16 or float16), else path. Raises
    ValueError, with the remedy, for an unknown name or a backend that cannot run there; call it
    at start so that a run fails before it computes anything.
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise ValueError(f"attention_backend {name!r} is unknown; use one of {', '.join(BACKENDS)}")
    if not dtype.is_floating_point:
        raise ValueError(f"attention computes in floating point, got dtype {dtype}")
    if name in ("auto", "flash"):
        from megatron_prefix.attention.flash import why_not_flash

        obstacle = why_not_flash(device, dtype)
        if name == "auto":
            return "flash" if obstacle is None else "path"
        if obstacle is not None:
            raise ValueError(f"attention_backend flash cannot be used: {obstacle}")
    return name


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TreeLayout | TreePlan,
    backend: str = "auto",
    scale: float | None = None,
) -> torch.Tensor:
    """Exact softmax attention of one row of packed prefix trees, differentiable.

    `q` is [T, N, H], `k` and `v` are [T, G, H] with N a multiple of G (query head n uses the
    key/value head n // (N / G)); the result is [T, N, H]. `layout` says who sees whom; pass one
    `TreePlan` for all layers to plan only once. With a plan of some rows only, `q` and the result
    are the plan's queries, `k` and `v` its keys. `scale` multiplies the scores, 1 / sqrt(H) by
    default. Raises ValueError where shapes, dtypes, devices, the token count or the backend do
    not fit.
    """
    plan = _checked_plan(q, k, v, layout)
    backend = resolve_backend(backend, q.device, q.dtype)
    if scale is None:
        scale = q.size(-1) ** -0.5
    if backend == "dense":
        from megatron_prefix.attention.dense import dense_attention

        return dense_attention(q, k, v, plan, scale)
    if backend == "path":
        from megatron_prefix.attention.path import path_attention

        return path_attention(q, k, v, plan.path, scale)
    from megatron_prefix.attention.flash import flash_attention

    return flash_attention(q, k, v, plan.path, scale)


def _checked_plan(q, k, v, layout: TreeLayout | TreePlan) -> TreePlan:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"q needs shape [T, N, H], k and v [T, G, H] alike; got {shapes}")
    if q.size(2) != k.size(2):
        raise ValueError(f"q, k and v need the same head dim H; got {shapes}")
    if k.size(1) == 0 or q.size(1) % k.size(1) or q.size(2) == 0:
        raise ValueError(f"query heads need to be a multiple of the key/value heads; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            "q, k and v need one dtype and one device; got "
            + ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        )
    if isinstance(layout, TreePlan):
        _check_plan_device(layout, q.device)
    elif isinstance(layout, TreeLayout):
        layout = TreePlan(layout, q.device)
    else:
        raise ValueError(f"layout needs to be a TreeLayout or TreePlan, got {type(layout)}")
    if (layout.num_queries, layout.num_keys) != (q.size(0), k.size(0)):
        raise ValueError(
            f"the layout has {layout.num_queries} tokens for q and {layout.num_keys} for k and v, "
            f"which have {q.size(0)} and {k.size(0)}; pad with a tree of its own, without loss, "
            "behind the others"
        )
    return layout


def _check_plan_device(plan: TreePlan, device: torch.device) -> None:
    same_index = None in (plan.device.index, device.index) or plan.device.index == device.index
    if plan.device.type != device.type or not same_index:
        raise ValueError(
            f"the plan was built for {plan.device}, q is on {device}; build TreePlan(layout, "
            "q.device)"
        )
