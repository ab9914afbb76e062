"""The one entrance to attention over trees: check, choose, dispatch.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch

from megatron_prefix.attention.auto import candidates, read_table
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.layout import TreeLayout

BACKENDS = ("auto", "dense", "path", "flash", "te", "flex")


def resolve_backend(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int | None = None,
    gather_factor: float | None = None,
) -> str:
    """The backend that `name` stands for: dense, path, flash, te or flex.

    `auto` is the first entry of auto_table.json that fits the arguments and runs there; entries
    that ask for what is not given do not fit. Raises ValueError, with the remedy, for an unknown
    name or a backend that cannot run there; call it at start so that a run fails before it
    computes anything.
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise ValueError(f"attention_backend {name!r} is unknown; use one of {', '.join(BACKENDS)}")
    if not dtype.is_floating_point:
        raise ValueError(f"attention computes in floating point, got dtype {dtype}")
    if name == "auto":
        fitting = candidates(read_table(), device, dtype, head_dim, gather_factor)
        return next(x for x in fitting if why_not(x, device, dtype, head_dim) is None)
    if obstacle := why_not(name, device, dtype, head_dim):
        raise ValueError(f"attention_backend {name} cannot be used: {obstacle}")
    return name


def why_not(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """What keeps `backend` from running on `device`, with the remedy; else None."""
    if backend == "flash":
        from megatron_prefix.attention.backends.flash import why_not_flash as why_not_this
    elif backend == "te":
        from megatron_prefix.attention.backends.te import why_not_te as why_not_this
    elif backend == "flex":
        from megatron_prefix.attention.backends.flex import why_not_flex as why_not_this
    else:  # dense and path run anywhere
        return None
    return why_not_this(device, dtype, head_dim)


def prepare(plan: TreePlan, backend: str, dtype: torch.dtype, head_dim: int) -> str:
    """Build what the backend reads of a plan, once, and return which backend `backend` is there.

    Layers do so themselves; whoever does it ahead keeps them from waiting for the host.
    """
    factor = plan.path.gather_factor if backend == "auto" else None
    backend = resolve_backend(backend, plan.device, dtype, head_dim, factor)
    if backend == "flex":
        from megatron_prefix.attention.backends.flex import plan_block_mask

        plan_block_mask(plan)
    elif backend != "dense":
        _ = plan.path
    return backend


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
    backend = prepare(plan, backend, q.dtype, q.size(-1))
    if scale is None:
        scale = q.size(-1) ** -0.5
    if backend == "dense":
        from megatron_prefix.attention.backends.dense import dense_attention

        return dense_attention(q, k, v, plan, scale)
    if backend == "path":
        from megatron_prefix.attention.backends.path import path_attention

        return path_attention(q, k, v, plan.path, scale)
    if backend == "flex":
        from megatron_prefix.attention.backends.flex import flex_tree_attention, plan_block_mask

        return flex_tree_attention(q, k, v, plan_block_mask(plan), scale)
    if backend == "te":
        from megatron_prefix.attention.backends.te import te_attention

        return te_attention(q, k, v, plan.path, scale)
    from megatron_prefix.attention.backends.flash import flash_attention

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
