"""Tree attention's public functions: check the arguments, choose a backend, call it.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_prefix.attention.auto import candidates, gather_factors, read_table
from megatron_prefix.attention.backends import BACKENDS, Scoring, load_backend
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.layout import TreeLayout


def resolve_backend(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int | None = None,
    gather_factor: float | None = None,
    features: Collection[str] = (),
) -> str:
    """The backend that `name` means: dense, path, flash, te or flex.

    `auto` is the first entry of auto_table.json that fits the arguments, can run on `device` and
    has all `features` (backends.FEATURES: window, softcap, sinks); on CUDA with a soft cap that is
    `flex` if it can run. An entry with a condition on an argument that is not given does not fit.
    Raises ValueError, with the remedy, for an unknown name or a backend that cannot run. Call it at
    start, so that a run fails before it computes anything.
    """
    device = torch.device(device)
    if name != "auto" and name not in BACKENDS:
        names = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"attention_backend {name!r} is unknown; use one of {names}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} cannot be used: attention computes in floating point")
    if name == "auto":
        # The last entry of the table has no condition, and its backend `path` runs everywhere and
        # lacks nothing: there is always one.
        fitting = candidates(read_table(), device, dtype, head_dim, gather_factor)
        if "softcap" in features:  # the kernels of the table's first choices have none
            fitting.insert(0, "flex")
        return next(
            x for x in fitting if not load_backend(x).obstacle(device, dtype, head_dim, features)
        )
    if obstacle := load_backend(name).obstacle(device, dtype, head_dim, features):
        raise ValueError(f"attention_backend {name} cannot be used: {obstacle}")
    return name


def check_fused_sums(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    features: Collection[str] = (),
) -> None:
    """Raise ValueError, with the remedy, if a row may get a backend that copies no keys, so that
    nothing of it is summed by `fuses_sums`. Arguments are those of `resolve_backend`."""
    factors = gather_factors(read_table()) if name == "auto" else [None]
    for factor in factors:
        backend = resolve_backend(name, device, dtype, head_dim, factor, features)
        if not load_backend(backend).copies_keys:
            chosen = f", which chooses {backend} here" if name == "auto" else ""
            rows = " for some rows" if factor else ""
            raise ValueError(
                f"key_sum_fusion = True has no effect with attention_backend: {name}{chosen}{rows}"
                ", and that copies no keys: remove it, or choose flash or te"
            )


def prepare_plan(
    plan: TreePlan, backend: str, dtype: torch.dtype, head_dim: int, features: Collection[str] = ()
) -> str:
    """Build what `backend` reads of a plan, once, and return its name, with `auto` resolved.

    Attention layers do this themselves. Done earlier, on another thread, it saves them the wait.
    `features` are those of `resolve_backend`; the plan's window is one without being named.
    """
    if plan.window is not None:
        features = {*features, "window"}
    # Only `auto` depends on the gather factor. For a backend given by name the leaf paths are not
    # built here: `dense` and `flex` do not need them.
    factor = plan.path.gather_factor if backend == "auto" else None
    backend = resolve_backend(backend, plan.device, dtype, head_dim, factor, features)
    load_backend(backend).prepare(plan)
    return backend


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout | TreePlan,
    backend: str = "auto",
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    fuses_sums: bool = False,
) -> Tensor:
    """Exact softmax attention of one row of packed prefix trees, differentiable.

    `q` is [T, N, H], `k` and `v` are [T, G, H], and N is a multiple of G: query head n uses the
    key/value head n // (N / G). The result is [T, N, H]. `layout` defines who sees whom; pass
    the same `TreePlan` to all layers to plan only once. With a plan of some tokens, `q` and the
    result are its queries, `k` and `v` its keys. `scale` multiplies the scores, by default
    1 / sqrt(H).

    With `window` a token sees only the last `window` tokens of its root path, itself included.
    `softcap` c turns each scaled score s into c tanh(s / c). `sinks` [N] are further scores in the
    softmax of each query head, without a value. With `fuses_sums` a Triton kernel sums the
    gradients of keys that `flash` and `te` copy; the others refuse it. Raises ValueError if shapes,
    dtypes, devices, token counts, these settings or the backend do not fit.
    """
    plan = _checked_plan(q, k, v, layout)
    _check_settings(q, plan, window, softcap, sinks)
    plan = plan.windowed(window)
    features = [x for x, given in (("softcap", softcap), ("sinks", sinks)) if given is not None]
    backend = prepare_plan(plan, backend, q.dtype, q.size(-1), features)
    if fuses_sums and not load_backend(backend).copies_keys:
        raise ValueError(
            f"fuses_sums has no effect with the backend {backend}, which copies no keys: leave it "
            "out, or choose flash or te"
        )
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scoring = Scoring(scale, softcap, sinks, fuses_sums)
    return load_backend(backend).attend(q, k, v, plan, scoring)


def _check_settings(
    q: Tensor, plan: TreePlan, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: a token sees at least itself, so give 1 or more")
    if window is not None and plan.window not in (None, window):
        raise ValueError(f"window is {window}, but the plan was built for {plan.window}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}: give a positive number, or None")
    if sinks is None:
        return
    if sinks.shape != q.shape[1:2] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"sinks need one number per query head, shape [{q.size(1)}] on {q.device}; got "
            f"{sinks.dtype} {tuple(sinks.shape)} on {sinks.device}"
        )


def _checked_plan(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout | TreePlan) -> TreePlan:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"q needs shape [T, N, H], k and v both need [T, G, H]; got {shapes}")
    if q.size(2) != k.size(2):
        raise ValueError(f"q, k and v need the same head dim H; got {shapes}")
    # 8 query heads over 2 key/value heads: heads 0 to 3 use head 0, heads 4 to 7 use head 1.
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
            f"which have {q.size(0)} and {k.size(0)}; for padding, add a tree without loss at the "
            "end of the layout"
        )
    return layout


def _check_plan_device(plan: TreePlan, device: torch.device) -> None:
    # torch.device("cuda") has no index and means the current device: it fits cuda:0 and cuda:1.
    same_index = None in (plan.device.index, device.index) or plan.device.index == device.index
    if plan.device.type != device.type or not same_index:
        raise ValueError(
            f"the plan was built for {plan.device}, but q is on {device}: build "
            "TreePlan(layout, q.device)"
        )
