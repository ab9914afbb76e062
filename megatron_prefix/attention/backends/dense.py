"""The specification of tree attention: a masked softmax over every pair of tokens.

It is slow, needs quadratic memory, and follows the definition in `layout.py` literally. Every
other backend is compared with it, values and gradients. Any device, any floating-point dtype.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch

from megatron_prefix.attention.backends.backend import Backend, runs_anywhere
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.layout import TreeLayout


def visibility(layout: TreeLayout, device: torch.device | str) -> torch.Tensor:
    """bool [T, T]: whether query token q sees key token k: `k <= q < subtree_end[k]`."""
    # lengths [1, 1, 1], parents [-1, 0, 0]: rows [1 0 0], [1 1 0], [1 0 1]; siblings do not see
    # each other
    q = torch.arange(layout.num_tokens, device=device).unsqueeze(1)
    k = torch.arange(layout.num_tokens, device=device).unsqueeze(0)
    subtree_ends = torch.from_numpy(layout.token_subtree_ends()).to(device)
    return (k <= q) & (q < subtree_ends)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the entries whose `mask` is true, in the dtype of `q`.

    q [Tq, N, H], k and v [Tk, G, H], mask bool [Tq, Tk] -> [Tq, N, H]. Query head n uses the
    key/value head n // (N / G). A query that sees no key gives NaN.
    """
    group_size = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q, k) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("nqk,knh->qnh", weights, v)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TreePlan, scale: float
) -> torch.Tensor:
    """Tree attention by the definition; arguments as `tree_attention` checks them."""
    mask = visibility(plan.layout, q.device)
    if plan.q_tokens is not None:
        mask = mask[torch.from_numpy(plan.q_tokens).to(q.device)]
    if plan.kv_tokens is not None:
        mask = mask[:, torch.from_numpy(plan.kv_tokens).to(q.device)]
    return masked_attention(q, k, v, mask, scale)


BACKEND = Backend(why_not=runs_anywhere, prepare=lambda plan: None, attend=dense_attention)
