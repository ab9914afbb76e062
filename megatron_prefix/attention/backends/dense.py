"""The specification of tree attention: a masked softmax over every pair of tokens.

It is slow, needs quadratic memory, and follows the definition in `layout.py` literally. Every
other backend is compared with it, values and gradients. Any device, any floating-point dtype.

Shapes: T tokens, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch

from megatron_prefix.attention.backends.backend import Backend, Scoring, runs_anywhere
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.layout import TreeLayout


def visibility(
    layout: TreeLayout, device: torch.device | str, window: int | None = None
) -> torch.Tensor:
    """bool [T, T]: whether query token q sees key token k: `k <= q < subtree_end[k]`, and with a
    sliding window `position[q] - position[k] < window`."""
    # lengths [1, 1, 1], parents [-1, 0, 0]: rows [1 0 0], [1 1 0], [1 0 1]; siblings do not see
    # each other
    q = torch.arange(layout.num_tokens, device=device).unsqueeze(1)
    k = torch.arange(layout.num_tokens, device=device).unsqueeze(0)
    subtree_ends = torch.from_numpy(layout.token_subtree_ends()).to(device)
    mask = (k <= q) & (q < subtree_ends)
    if window is None:
        return mask
    positions = torch.from_numpy(layout.position_ids()).to(device)
    return mask & (positions.unsqueeze(1) - positions.unsqueeze(0) < window)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the entries whose `mask` is true, in the dtype of `q`.

    q [Tq, N, H], k and v [Tk, G, H], mask bool [Tq, Tk] -> [Tq, N, H]. Query head n uses the
    key/value head n // (N / G). Scores s become softcap * tanh(s / softcap) before the mask (Gemma
    2, arXiv 2408.00118). `sinks` [N] are further scores in the softmax, without a value (gpt-oss,
    arXiv 2508.10925). Without sinks, a query that sees no key gives NaN.
    """
    group_size = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.size(1), 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("nqk,knh->qnh", weights, v)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TreePlan, scoring: Scoring
) -> torch.Tensor:
    """Tree attention by the definition; arguments as `tree_attention` checks them."""
    mask = visibility(plan.layout, q.device, plan.window)
    if plan.q_tokens is not None:
        mask = mask[torch.from_numpy(plan.q_tokens).to(q.device)]
    if plan.kv_tokens is not None:
        mask = mask[:, torch.from_numpy(plan.kv_tokens).to(q.device)]
    return masked_attention(q, k, v, mask, scoring.scale, scoring.softcap, scoring.sinks)


BACKEND = Backend(why_not=runs_anywhere, prepare=lambda plan: None, attend=dense_attention)
