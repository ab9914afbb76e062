"""Hidden rows -> log-probabilities of target tokens -> sums over responses.

A row may predict several targets (a branch point predicts every response's first token), so a
shifted label row cannot say what is wanted: targets name their row. Rows are projected once,
in chunks, with the vocabulary split over tensor-parallel ranks.

Shapes: U projected rows, N targets, R responses, C hidden channels, V vocabulary (local).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Project = Callable[[Tensor], Tensor]


class _VocabParallelLogps(torch.autograd.Function):
    """log softmax(logits)[row, target] with the vocabulary split over a process group."""

    @staticmethod
    def forward(ctx, logits_UV, row_N, target_N, vocab_size, group):
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        start = rank * logits_UV.size(1)
        scores_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32), copy=True)
        scores_UV[:, max(vocab_size - start, 0) :] = -torch.inf
        top_U = scores_UV.amax(dim=1)
        if size > 1:
            torch.distributed.all_reduce(top_U, torch.distributed.ReduceOp.MAX, group)
        exp_UV = scores_UV.sub_(top_U[:, None])
        local_N = target_N - start
        is_local_N = (local_N >= 0) & (local_N < logits_UV.size(1))
        local_N = torch.where(is_local_N, local_N, 0)
        picked_N = torch.where(is_local_N, exp_UV[row_N, local_N], 0)
        exp_UV = exp_UV.exp_()
        sums_U = exp_UV.sum(dim=1)
        if size > 1:
            torch.distributed.all_reduce(sums_U, group=group)
            torch.distributed.all_reduce(picked_N, group=group)
        softmax_UV = exp_UV.div_(sums_U[:, None])
        ctx.save_for_backward(softmax_UV, row_N, local_N, is_local_N)
        ctx.dtype = logits_UV.dtype
        return picked_N - sums_U.log()[row_N]

    @staticmethod
    def backward(ctx, grad_N):
        softmax_UV, row_N, local_N, is_local_N = ctx.saved_tensors
        weight_U = softmax_UV.new_zeros(softmax_UV.size(0)).index_put_((row_N,), grad_N, True)
        grad_UV = softmax_UV * -weight_U[:, None]
        grad_UV.index_put_((row_N, local_N), torch.where(is_local_N, grad_N, 0), accumulate=True)
        return grad_UV.to(ctx.dtype), None, None, None, None


def vocab_parallel_logps(
    logits_UV: Tensor,
    row_N: Tensor,
    target_N: Tensor,
    vocab_size: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of `target_N[i]` under row `row_N[i]` of the logits, [N].

    float32 whatever the logits' precision (float64 stays). `logits_UV` is this rank's slice of
    the vocabulary; columns from `vocab_size` on are padding and have probability 0. A (row,
    target) entry may repeat, and each repetition adds to the gradient.
    """
    return _VocabParallelLogps.apply(logits_UV, row_N, target_N, vocab_size, group)


def token_logps(
    hidden_UC: Tensor,
    project: Project,
    row_N: Tensor,
    target_N: Tensor,
    *,
    vocab_size: int,
    chunk_size: int,
    offsets: np.ndarray | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Project rows and take their targets' log-probabilities, float32 [N].

    `row_N` ascends. At most `chunk_size` rows are logits at a time: with more rows each chunk
    is projected again in backward, so that no logits outlive their chunk. Row u has the targets
    `offsets[u]` to `offsets[u + 1]`, [U + 1] on the host; without them the device is asked.
    """

    def chunk_logps(hidden: Tensor, row: Tensor, target: Tensor) -> Tensor:
        return vocab_parallel_logps(project(hidden), row, target, vocab_size, group)

    num_rows = hidden_UC.size(0)
    if num_rows <= chunk_size:
        return chunk_logps(hidden_UC, row_N, target_N)
    if offsets is None:
        offsets = np.searchsorted(row_N.cpu().numpy(), np.arange(num_rows + 1))
    cuts = [*offsets[:num_rows:chunk_size].tolist(), len(row_N)]
    parts = [
        checkpoint(
            chunk_logps,
            hidden,
            row_N[cuts[i] : cuts[i + 1]] - i * chunk_size,
            target_N[cuts[i] : cuts[i + 1]],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i, hidden in enumerate(hidden_UC.split(chunk_size))
    ]
    return torch.cat(parts)


def response_logps(token_logps_N: Tensor, order_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum each response's token log-probabilities in float64, in a fixed order, [R].

    `order_N` sorts the targets by response; response r has
    `order_N[offsets[r] : offsets[r + 1]]`.
    """
    ordered = token_logps_N.to(torch.float64)[order_N]
    return torch.segment_reduce(ordered, "sum", offsets=offsets, unsafe=True, initial=0.0)
