"""Leaf paths one after another, on any device: the fast backend on CPU.

A piece of the plan (see `plan.py`) is computed in two blocks: its queries against their own
tokens, causally, and against all tokens of their ancestors, without a mask. Each block gives an
output and a log-sum-exp, by which the outputs are merged. In backward each block gets the merged
output and log-sum-exp, so its gradient is its share of the whole (the FlashAttention-2 backward,
arXiv 2307.08691, applied block by block). So no mask is ever built. Keys are copied only for
a piece whose ancestors are several separate runs of tokens.

    piece 2 of  [prompt 0..3 | response 3..5 | response 5..9]:
    tokens 5..9 causal against tokens 5..9, and in full against tokens 0..3

Only q, k, v, the output and the log-sum-exp are saved for backward. Gradients of shared keys are
summed in float32 or better, piece after piece, so always in the same order.

Shapes: T tokens (queries or keys), N query heads, G key/value heads, H head dim; L queries, S keys
of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from megatron_prefix.attention.backends.backend import Backend, runs_anywhere
from megatron_prefix.attention.plan import PathPlan

Tokens = tuple[int, int] | torch.Tensor
"""Contiguous tokens as (start, length), others as an index tensor."""

PLAIN_BLOCK = 1024
"""Queries whose scores `PLAIN` holds at a time."""


def path_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PathPlan, scale: float
) -> torch.Tensor:
    """Tree attention piece by piece; arguments as `tree_attention` checks them."""
    return _PathAttention.apply(q, k, v, plan, scale, _kernel_for(q.device))


class Kernel(NamedTuple):
    """Attention of one block and its gradient, on tensors [G, N/G, length, H].

    `forward(q, k, v, causal, scale) -> out, lse`;
    `backward(grad_out, q, k, v, out, lse, causal, scale) -> dq, dk, dv`. dk and dv have N/G
    entries in dimension 1, which the caller sums. `causal` is true only for square blocks.
    """

    forward: Callable
    backward: Callable


class _PathAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, kernel):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        exact = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(q.shape[:2], dtype=exact, device=q.device)
        by_head = _by_head(k.size(1), q, out, lse.unsqueeze(-1))
        k_heads, v_heads = _expanded(q.size(1), k, v)
        for queries, own, ancestors in _blocks(plan):
            q_own, out_own, lse_own = (_select(x, queries) for x in by_head)
            block_out, block_lse = kernel.forward(
                q_own, _select(k_heads, own), _select(v_heads, own), True, scale
            )
            if ancestors is not None:
                far_out, far_lse = kernel.forward(
                    q_own, _select(k_heads, ancestors), _select(v_heads, ancestors), False, scale
                )
                # Softmax over both key sets: outputs are weighted by their sums of exponentials.
                #   out = (e^lse out + e^far_lse far_out) / (e^lse + e^far_lse)
                # so far_out has the weight 1 / (1 + e^(lse - far_lse)), which is a sigmoid.
                weight = torch.sigmoid(far_lse - block_lse).unsqueeze(-1)
                block_out = torch.lerp(block_out.to(exact), far_out.to(exact), weight)
                block_lse = torch.logaddexp(block_lse, far_lse)
            out_own.copy_(block_out)
            lse_own.copy_(block_lse.unsqueeze(-1))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.kernel = plan, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dk, dv = (torch.zeros(k.shape, dtype=lse.dtype, device=k.device) for _ in range(2))
        by_head = _by_head(k.size(1), grad_out, q, out, lse.unsqueeze(-1), dq)
        k_heads, v_heads = _expanded(q.size(1), k, v)
        for queries, own, ancestors in _blocks(ctx.plan):
            grad_own, q_own, out_own, lse_own, dq_own = (_select(x, queries) for x in by_head)
            for keys, causal in ((own, True), (ancestors, False)):
                if keys is None:
                    continue
                grads = ctx.kernel.backward(
                    grad_own,
                    q_own,
                    _select(k_heads, keys),
                    _select(v_heads, keys),
                    out_own,
                    lse_own.squeeze(-1),
                    causal,
                    ctx.scale,
                )
                dq_own.add_(grads[0])
                _add_to(dk, keys, grads[1])
                _add_to(dv, keys, grads[2])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _blocks(plan: PathPlan) -> Iterator[tuple[Tokens, Tokens, Tokens | None]]:
    """For each piece its queries, its own keys, and its ancestors' keys (None if it has none)."""
    # lengths [3, 2, 4], parents [-1, 0, 0]:
    #   piece 1: queries (0, 5), own keys (0, 5), no ancestors
    #   piece 2: queries (5, 4), own keys (5, 4), ancestors (0, 3)
    q_start = kv_start = 0
    for q_length, kv_length, own_start, ancestor_start in zip(
        plan.q_lengths, plan.kv_lengths, plan.own_starts, plan.ancestor_starts, strict=True
    ):
        num_ancestors = kv_length - q_length
        ancestors: Tokens | None
        if num_ancestors == 0:
            ancestors = None
        elif ancestor_start >= 0:
            ancestors = (ancestor_start, num_ancestors)
        else:
            ancestors = plan.kv_index[kv_start : kv_start + num_ancestors]
        yield (q_start, q_length), (own_start, q_length), ancestors
        q_start += q_length
        kv_start += kv_length


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


def _kernel_for(device: torch.device) -> Kernel:
    return CPU_FLASH if device.type == "cpu" else PLAIN


def _cpu_forward(q, k, v, causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )


def _cpu_backward(grad_out, q, k, v, out, lse, causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _plain_scores(q, k, causal, scale, begin):
    """Scores of queries `begin:begin + PLAIN_BLOCK` with the keys that they may see."""
    queries = q[:, :, begin : begin + PLAIN_BLOCK]
    if not causal:
        return queries @ k.mT * scale
    end = begin + queries.size(2)
    scores = queries @ k[:, :, :end].mT * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(begin + 1)
    return scores.masked_fill_(future, float("-inf"))


def _plain_forward(q, k, v, causal, scale):
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for begin in range(0, q.size(2), PLAIN_BLOCK):
        scores = _plain_scores(q, k, causal, scale, begin)
        block = slice(begin, begin + PLAIN_BLOCK)
        lse[:, :, block] = scores.logsumexp(-1)
        out[:, :, block] = scores.softmax(-1) @ v[:, :, : scores.size(-1)]
    return out, lse


def _plain_backward(grad_out, q, k, v, out, lse, causal, scale):
    exact = torch.promote_types(q.dtype, torch.float32)
    grad_out, q, k, v, out = (x.to(exact) for x in (grad_out, q, k, v, out))
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=q.device) for x in (q, k, v))
    # With weights P = softmax(S) and O = P V:  dV = P^T dO,  dP = dO V^T, and
    #   dS = P (dP - rowsum(dP P)) = P (dP - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q
    mean_grad = (grad_out * out).sum(-1, keepdim=True)
    for begin in range(0, q.size(2), PLAIN_BLOCK):
        block = slice(begin, begin + PLAIN_BLOCK)
        weights = _plain_scores(q, k, causal, scale, begin)
        weights = (weights - lse[:, :, block, None]).exp_()
        seen = slice(0, weights.size(-1))
        dv[:, :, seen] += weights.mT @ grad_out[:, :, block]
        d_scores = weights * (grad_out[:, :, block] @ v[:, :, seen].mT - mean_grad[:, :, block])
        d_scores *= scale
        dq[:, :, block] = d_scores @ k[:, :, seen]
        dk[:, :, seen] += d_scores.mT @ q[:, :, block]
    return dq, dk, dv


CPU_FLASH = Kernel(_cpu_forward, _cpu_backward)
"""torch's blockwise kernels for CPU."""
PLAIN = Kernel(_plain_forward, _plain_backward)
"""Matrix products, `PLAIN_BLOCK` queries at a time, for devices without such kernels."""

BACKEND = Backend(
    why_not=runs_anywhere,
    prepare=lambda plan: plan.path,
    attend=lambda q, k, v, plan, scale: path_attention(q, k, v, plan.path, scale),
)
