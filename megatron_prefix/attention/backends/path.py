"""Leaf paths one after another, on any device: the fast backend on CPU.

A piece of the plan (see `plan.py`) is computed in two blocks: its queries against their own
tokens, causally, and against all tokens of their ancestors, without a mask. Each block gives an
output and a log-sum-exp, by which the outputs are merged. In backward each block gets the merged
output and log-sum-exp, so its gradient is its share of the whole (the FlashAttention-2 backward,
arXiv 2307.08691, applied block by block). So no mask is ever built. Keys are copied only for
a piece whose ancestors are several separate runs of tokens.

    piece 2 of  [prompt 0..3 | response 3..5 | response 5..9]:
    tokens 5..9 causal against tokens 5..9, and in full against tokens 0..3

With a sliding window, a piece that is longer than the window is computed in chunks of queries, each
against the keys that its queries see, under a mask of chunk times keys. So the work is that of the
window, however long the path.

Sinks change the merged output and log-sum-exp (sinks.py). Soft caps need the scores themselves, so
the plain kernel computes them, also on CPU.

Only q, k, v, the output and the log-sum-exp are saved for backward. Gradients of shared keys are
summed in float32 or better, piece after piece, so always in the same order.

Shapes: T tokens (queries or keys), N query heads, G key/value heads, H head dim; L queries, S keys
of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from megatron_prefix.attention.backends.backend import Backend, Scoring, runs_anywhere
from megatron_prefix.attention.backends.sinks import add_sinks, sink_gradient
from megatron_prefix.attention.plan import PathPlan

Tokens = tuple[int, int] | torch.Tensor
"""Contiguous tokens as (start, length), others as an index tensor."""

Mask = bool | torch.Tensor
"""False: all keys are seen. True: causal, as many keys as queries. Or bool [queries, keys]."""

PLAIN_BLOCK = 1024
"""Queries whose scores `PLAIN` holds at a time."""
LEAST_CHUNK, MOST_CHUNK = 64, 512
"""Bounds for the queries of one chunk; between them it has as many as the window."""


def path_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PathPlan, scoring: Scoring
) -> torch.Tensor:
    """Tree attention piece by piece; arguments as `tree_attention` checks them."""
    kernel = kernel_for(q.device, scoring.softcap)
    return _PathAttention.apply(q, k, v, scoring.sinks, plan, scoring, kernel)


class Kernel(NamedTuple):
    """Attention of one block and its gradient, on tensors [G, N/G, length, H].

    `forward(q, k, v, mask, scoring) -> out, lse`;
    `backward(grad_out, q, k, v, out, lse, mask, scoring) -> dq, dk, dv`. dk and dv have N/G
    entries in dimension 1, which the caller sums. Sinks are the caller's.
    """

    forward: Callable
    backward: Callable


class _PathAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, scoring, kernel):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        exact = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(q.shape[:2], dtype=exact, device=q.device)
        by_head = _by_head(k.size(1), q, out, lse.unsqueeze(-1))
        k_heads, v_heads = _expanded(q.size(1), k, v)
        for queries, blocks in _blocks(plan):
            q_own, out_own, lse_own = (_select(x, queries) for x in by_head)
            (block_out, block_lse), *others = [
                kernel.forward(q_own, _select(k_heads, keys), _select(v_heads, keys), mask, scoring)
                for keys, mask in blocks
            ]
            for far_out, far_lse in others:
                block_out, block_lse = _merged(block_out, block_lse, far_out, far_lse, exact)
            out_own.copy_(block_out)
            lse_own.copy_(block_lse.unsqueeze(-1))
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan, ctx.scoring, ctx.kernel = plan, scoring._replace(sinks=None), kernel
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, sinks = ctx.saved_tensors
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dk, dv = (torch.zeros(k.shape, dtype=lse.dtype, device=k.device) for _ in range(2))
        by_head = _by_head(k.size(1), grad_out, q, out, lse.unsqueeze(-1), dq)
        k_heads, v_heads = _expanded(q.size(1), k, v)
        for queries, blocks in _blocks(ctx.plan):
            grad_own, q_own, out_own, lse_own, dq_own = (_select(x, queries) for x in by_head)
            for keys, mask in blocks:
                grads = ctx.kernel.backward(
                    grad_own,
                    q_own,
                    _select(k_heads, keys),
                    _select(v_heads, keys),
                    out_own,
                    lse_own.squeeze(-1),
                    mask,
                    ctx.scoring,
                )
                dq_own.add_(grads[0])
                _add_to(dk, keys, grads[1])
                _add_to(dv, keys, grads[2])
        d_sinks = None if sinks is None else sink_gradient(grad_out, out, lse, sinks)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None, None


def _merged(out, lse, far_out, far_lse, exact):
    """Softmax over the keys of both blocks: outputs weighted by their sums of exponentials."""
    #   out = (e^lse out + e^far_lse far_out) / (e^lse + e^far_lse)
    # so far_out has the weight 1 / (1 + e^(lse - far_lse)), which is a sigmoid.
    weight = torch.sigmoid(far_lse - lse).unsqueeze(-1)
    return torch.lerp(out.to(exact), far_out.to(exact), weight), torch.logaddexp(lse, far_lse)


def _blocks(plan: PathPlan) -> Iterator[tuple[Tokens, list[tuple[Tokens, Mask]]]]:
    """Runs of queries, each with its blocks of keys and their masks."""
    # lengths [3, 2, 4], parents [-1, 0, 0]:
    #   piece 1: queries (0, 5), own keys (0, 5), no ancestors
    #   piece 2: queries (5, 4), own keys (5, 4), ancestors (0, 3)
    window = plan.window
    q_start = kv_start = 0
    for q_length, kv_length, own_start, ancestor_start in zip(
        plan.q_lengths, plan.kv_lengths, plan.own_starts, plan.ancestor_starts, strict=True
    ):
        num_ancestors = kv_length - q_length
        ancestors: Tokens
        if ancestor_start >= 0:
            ancestors = (ancestor_start, num_ancestors)
        else:
            ancestors = plan.kv_index[kv_start : kv_start + num_ancestors]
        if window is None or kv_length <= window:
            blocks: list[tuple[Tokens, Mask]] = [((own_start, q_length), True)]
            if num_ancestors:
                blocks.append((ancestors, False))
            yield (q_start, q_length), blocks
        else:
            path = plan.kv_index[kv_start : kv_start + kv_length]
            is_run = not num_ancestors or ancestor_start + num_ancestors == own_start
            for begin, end, first_key, mask in _chunks(q_length, kv_length, window, path.device):
                keys: Tokens = path[first_key : num_ancestors + end]
                if is_run or first_key >= num_ancestors:
                    keys = (own_start - num_ancestors + first_key, len(keys))
                yield (q_start + begin, end - begin), [(keys, mask)]
        q_start += q_length
        kv_start += kv_length


def _chunks(
    q_length: int, kv_length: int, window: int, device: torch.device
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Of a piece's queries the chunks `begin:end`, the first key of its path that each sees, and
    the mask of its keys from there to its own last one."""
    # 5 queries after 4 ancestors, window 3, chunks of 3:
    #   queries 0:3 are keys 4, 5, 6 of the path and see it from key 2   [1 1 1 0 0, 0 1 1 1 0, …]
    #   queries 3:5 are keys 7, 8                        from key 5      [1 1 1 0, 0 1 1 1]
    size = min(max(window, LEAST_CHUNK), MOST_CHUNK)
    num_ancestors = kv_length - q_length
    for begin in range(0, q_length, size):
        end = min(begin + size, q_length)
        first_key = max(num_ancestors + begin - window + 1, 0)
        query = torch.arange(num_ancestors + begin, num_ancestors + end, device=device)
        key = torch.arange(first_key, num_ancestors + end, device=device)
        distance = query.unsqueeze(1) - key.unsqueeze(0)
        yield begin, end, first_key, (distance >= 0) & (distance < window)


def _select(heads: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """[G, N/G, T, H] -> [G, N/G, L, H]; a view if the tokens are contiguous."""
    if isinstance(tokens, tuple):
        return heads.narrow(2, *tokens)
    gathered = heads[:, :1].index_select(2, tokens)  # the heads of a group have the same keys
    return gathered.expand(-1, heads.size(1), -1, -1)


def _add_to(grad: torch.Tensor, tokens: Tokens, block: torch.Tensor) -> None:
    """Add a block [G, N/G, L, H] to the entries `tokens` of a gradient [T, G, H]."""
    block = block.sum(1, dtype=grad.dtype) if block.size(1) > 1 else block.squeeze(1)
    block = block.transpose(0, 1)
    if isinstance(tokens, tuple):
        grad.narrow(0, *tokens).add_(block)
    else:  # a token occurs once in a path, so no index repeats
        grad[tokens] += block


def _by_head(num_groups: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Views [T, N, x] -> [G, N/G, T, x]."""
    return [x.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3) for x in tensors]


def _expanded(num_heads: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Views [T, G, H] -> [G, N/G, T, H] that repeat each key/value head without a copy."""
    return [
        x.transpose(0, 1).unsqueeze(1).expand(-1, num_heads // x.size(1), -1, -1) for x in tensors
    ]


def kernel_for(device: torch.device, softcap: float | None = None) -> Kernel:
    """The kernel for a device; only `PLAIN` has soft caps."""
    return CPU_FLASH if device.type == "cpu" and softcap is None else PLAIN


def _cpu_mask(q, mask):
    """The arguments of torch's kernel for a mask: it adds floating-point masks to the scores."""
    if isinstance(mask, bool):
        return mask, None
    return False, torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))


def _cpu_forward(q, k, v, mask, scoring):
    causal, added = _cpu_mask(q, mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=added, scale=scoring.scale
    )


def _cpu_backward(grad_out, q, k, v, out, lse, mask, scoring):
    causal, added = _cpu_mask(q, mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scoring.scale
    )


def _plain_scores(q, k, mask, scoring, begin):
    """Scores of queries `begin:begin + PLAIN_BLOCK` with the keys that they may see, and the
    derivative of the soft cap if there is one."""
    queries = q[:, :, begin : begin + PLAIN_BLOCK]
    end = begin + queries.size(2)
    scores = queries @ (k[:, :, :end] if mask is True else k).mT * scoring.scale
    slope = None
    if scoring.softcap is not None:
        bounded = torch.tanh(scores / scoring.softcap)
        scores, slope = scoring.softcap * bounded, 1 - bounded**2
    if mask is True:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(begin + 1)
        scores.masked_fill_(future, float("-inf"))
    elif mask is not False:
        scores.masked_fill_(~mask[begin:end], float("-inf"))
    return scores, slope


def _plain_forward(q, k, v, mask, scoring):
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for begin in range(0, q.size(2), PLAIN_BLOCK):
        scores, _ = _plain_scores(q, k, mask, scoring, begin)
        block = slice(begin, begin + PLAIN_BLOCK)
        lse[:, :, block] = scores.logsumexp(-1)
        out[:, :, block] = scores.softmax(-1) @ v[:, :, : scores.size(-1)]
    return out, lse


def _plain_backward(grad_out, q, k, v, out, lse, mask, scoring):
    exact = torch.promote_types(q.dtype, torch.float32)
    grad_out, q, k, v, out = (x.to(exact) for x in (grad_out, q, k, v, out))
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=q.device) for x in (q, k, v))
    # With weights P = softmax(S) and O = P V:  dV = P^T dO,  dP = dO V^T, and
    #   dS = P (dP - rowsum(dP P)) = P (dP - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q
    # A soft cap c tanh(s / c) multiplies dS by 1 - tanh(s / c)^2.
    mean_grad = (grad_out * out).sum(-1, keepdim=True)
    for begin in range(0, q.size(2), PLAIN_BLOCK):
        block = slice(begin, begin + PLAIN_BLOCK)
        weights, slope = _plain_scores(q, k, mask, scoring, begin)
        weights = (weights - lse[:, :, block, None]).exp_()
        seen = slice(0, weights.size(-1))
        dv[:, :, seen] += weights.mT @ grad_out[:, :, block]
        d_scores = weights * (grad_out[:, :, block] @ v[:, :, seen].mT - mean_grad[:, :, block])
        d_scores *= scoring.scale
        if slope is not None:
            d_scores *= slope
        dq[:, :, block] = d_scores @ k[:, :, seen]
        dk[:, :, seen] += d_scores.mT @ q[:, :, block]
    return dq, dk, dv


CPU_FLASH = Kernel(_cpu_forward, _cpu_backward)
"""torch's blockwise kernels for CPU."""
PLAIN = Kernel(_plain_forward, _plain_backward)
"""Matrix products, `PLAIN_BLOCK` queries at a time: for other devices, and for soft caps."""

BACKEND = Backend(
    why_not=runs_anywhere,
    prepare=lambda plan: plan.path,
    attend=lambda q, k, v, plan, scoring: path_attention(q, k, v, plan.path, scoring),
)
