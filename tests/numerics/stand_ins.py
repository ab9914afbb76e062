"""Stand-ins for CUDA's kernels in plain torch, so that the code around them can be tested on any
device. They compute what the kernels are documented to compute.

Shapes: L queries, S keys of a piece, N query heads, G key/value heads, H head dim.
"""

from functools import partial

import torch

from megatron_prefix.attention.backends import Scoring
from megatron_prefix.attention.backends.flash import Operators, flash_attention
from megatron_prefix.attention.backends.te import te_attention, with_sinks
from megatron_prefix.attention.plan import build_path_plan


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **window):
    """Stand-in for the flash operator: bottom-right causal pieces, densely; a window is causal by
    its right side."""
    assert not debug and dropout == 0.0
    assert max_q >= cu_q.diff().max() and max_k == cu_k.diff().max()
    out, lse = torch.empty_like(q), q.new_empty(q.size(1), q.size(0))
    for q_rows, k_rows in pieces(cu_q, cu_k):
        scores = piece_scores(q[q_rows], k[k_rows], scale, causal, **window)
        lse[:, q_rows] = scores.logsumexp(-1)
        out[q_rows] = torch.einsum("nqk,knh->qnh", scores.softmax(-1), grouped(v[k_rows], q))
    marker = torch.tensor([len(cu_q), len(cu_k)])
    return out, lse, marker, marker.clone(), torch.empty(0)


def varlen_backward(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout,
    causal,
    rng,
    unused,
    *,
    scale,
    **window,
):
    """Its gradient, written out; insists on the forward's random state coming back."""
    assert rng.tolist() == unused.tolist() == [len(cu_q), len(cu_k)]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for q_rows, k_rows in pieces(cu_q, cu_k):
        qp, kp, g = q[q_rows], k[k_rows], grad_out[q_rows]
        weights = (piece_scores(qp, kp, scale, causal, **window) - lse[:, q_rows, None]).exp()
        d_weights = torch.einsum("qnh,knh->nqk", g, grouped(v[k_rows], q))
        mean = (g * out[q_rows]).sum(-1).T.unsqueeze(-1)
        d_scores = weights * (d_weights - mean) * scale
        dq[q_rows] = torch.einsum("nqk,knh->qnh", d_scores, grouped(kp, q))
        by_group = (-1, k.size(1), q.size(1) // k.size(1), k.size(2))
        dk[k_rows] = torch.einsum("nqk,qnh->knh", d_scores, qp).reshape(by_group).sum(2)
        dv[k_rows] = torch.einsum("nqk,qnh->knh", weights, g).reshape(by_group).sum(2)
    return dq, dk, dv


def pieces(cu_q, cu_k):
    q_rows = [slice(a, b) for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)]
    k_rows = [slice(a, b) for a, b in zip(cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)]
    return zip(q_rows, k_rows, strict=True)


def grouped(x, q):
    return x.repeat_interleave(q.size(1) // x.size(1), 1)


def piece_scores(q, k, scale, causal, window_size_left=None, window_size_right=None):
    """Scores of one piece; `None` is no bound, as -1 is for the kernels."""
    scores = torch.einsum("qnh,knh->nqk", q, grouped(k, q)) * scale
    shift = k.size(0) - q.size(0)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if causal or window_size_right is not None:
        assert not window_size_right
        seen = seen.tril(shift)
    if window_size_left is not None:
        seen = seen.triu(shift - window_size_left)
    return scores.masked_fill(~seen, float("-inf"))


def stand_in_flash(layout, *rows, window=None, sinks=None):
    plan = build_path_plan(layout, "cpu", *rows, window=window)
    operators = Operators(varlen_forward, varlen_backward)

    def attention(q, k, v):
        scoring = Scoring(q.size(-1) ** -0.5, sinks=sinks)
        return flash_attention(q, k, v, plan, scoring, operators)

    return attention


class VarlenAttention(torch.autograd.Function):
    """Saves what it is given and what it computes, as kernels with a backward of their own do."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
        out, lse, *states, _ = varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale, **window
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, *states)
        ctx.rest = (max_q, max_k, scale, window)
        return out.flatten(1)

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, cu_q, cu_k, *states = ctx.saved_tensors
        max_q, max_k, scale, window = ctx.rest
        grad_out = grad_out.view_as(out)
        grads = varlen_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu_k,
            max_q,
            max_k,
            0.0,
            True,
            *states,
            scale=scale,
            **window,
        )
        return *grads, None, None, None, None, None, None


def te_module(num_heads, num_groups, head_dim, scale, is_deterministic, has_sinks):
    """Stand-in for Transformer Engine's module, with the arguments that te.py gives it. With sinks
    it is a module whose parameter has their name, and autograd takes their gradient."""

    def forward(sinks, *, query_layer, key_layer, value_layer, qkv_format, attn_mask_type, **rest):
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal_bottom_right")
        assert query_layer.shape[1:] == (num_heads, head_dim) and query_layer.is_contiguous()
        assert key_layer.shape == value_layer.shape and key_layer.size(1) == num_groups
        assert rest.pop("pad_between_seqs") is False
        names = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")
        sizes = [rest.pop(name) for name in names]
        left, right = rest.pop("window_size", (None, 0))
        window = {} if left is None else {"window_size_left": left, "window_size_right": right}
        assert not rest and all(type(x) is int for x in sizes[2:])
        inputs = query_layer, key_layer, value_layer, *sizes
        if sinks is None:
            return VarlenAttention.apply(*inputs, scale, window)
        assert sinks.shape == (num_heads,)
        out = torch.empty_like(query_layer)
        for q_rows, k_rows in pieces(*sizes[:2]):
            scores = piece_scores(query_layer[q_rows], key_layer[k_rows], scale, True, **window)
            column = sinks[:, None, None].expand(-1, scores.size(1), 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
            values = grouped(value_layer[k_rows], query_layer)
            out[q_rows] = torch.einsum("nqk,knh->qnh", weights, values)
        return out.flatten(1)

    if not has_sinks:
        return partial(forward, None)
    return partial(with_sinks, SinksModule(num_heads, forward))


class SinksModule(torch.nn.Module):
    def __init__(self, num_heads, function):
        super().__init__()
        self.softmax_offset = torch.nn.Parameter(torch.full((num_heads,), torch.nan))
        self.function = function

    def forward(self, **arguments):
        return self.function(self.softmax_offset, **arguments)


def stand_in_te(layout, *rows, window=None, sinks=None):
    plan = build_path_plan(layout, "cpu", *rows, window=window)

    def attention(q, k, v):
        return te_attention(q, k, v, plan, Scoring(q.size(-1) ** -0.5, sinks=sinks), te_module)

    return attention
