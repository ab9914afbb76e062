"""Hidden states -> log-probabilities of target tokens -> sums over responses.

A token may predict several targets: a branch point predicts the first token of every response. So
shifted labels cannot express the targets; each target names the token that predicts it. Every such
token is projected to logits once, in chunks, with the vocabulary split over tensor-parallel ranks.

Shapes: U tokens with logits, N targets, R responses, C hidden channels, V vocabulary (local).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_prefix.model.fused_logps import FusedLogps

Project = Callable[[Tensor], Tensor]


class _VocabParallelLogps(torch.autograd.Function):
    """log softmax(logits)[logit, target] with the vocabulary split over a process group.

    Two ranks with 3 columns each: token 4 is column 1 of rank 1. There `picked` is its score minus
    the maximum; on rank 0, which does not have the token, it is 0; the sum over ranks is right.
    """

    @staticmethod
    def forward(ctx, logits_UV, logit_N, target_N, vocab_size, group):
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        start = rank * logits_UV.size(1)
        scores_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32), copy=True)
        # 10 tokens padded to 12, 2 ranks: rank 0 starts at 0 and masks nothing, rank 1 starts at 6
        # and masks its columns from 4 on
        scores_UV[:, max(vocab_size - start, 0) :] = -torch.inf
        # log p(t) = (s_t - top) - log sum exp(s - top), with the maximum of the whole vocabulary,
        # not of this rank's columns, so that all ranks subtract the same number.
        top_U = scores_UV.amax(dim=1)
        if size > 1:
            torch.distributed.all_reduce(top_U, torch.distributed.ReduceOp.MAX, group)
        exp_UV = scores_UV.sub_(top_U[:, None])
        local_N = target_N - start
        is_local_N = (local_N >= 0) & (local_N < logits_UV.size(1))
        local_N = torch.where(is_local_N, local_N, 0)
        picked_N = torch.where(is_local_N, exp_UV[logit_N, local_N], 0)
        exp_UV = exp_UV.exp_()
        sums_U = exp_UV.sum(dim=1)
        if size > 1:
            torch.distributed.all_reduce(sums_U, group=group)
            torch.distributed.all_reduce(picked_N, group=group)
        softmax_UV = exp_UV.div_(sums_U[:, None])
        ctx.save_for_backward(softmax_UV, logit_N, local_N, is_local_N)
        ctx.dtype = logits_UV.dtype
        return picked_N - sums_U.log()[logit_N]

    @staticmethod
    def backward(ctx, grad_N):
        softmax_UV, logit_N, local_N, is_local_N = ctx.saved_tensors
        # d logp / d logits = onehot(target) - softmax, summed over the targets of each token
        weight_U = softmax_UV.new_zeros(softmax_UV.size(0)).index_put_((logit_N,), grad_N, True)
        grad_UV = softmax_UV * -weight_U[:, None]
        grad_UV.index_put_((logit_N, local_N), torch.where(is_local_N, grad_N, 0), accumulate=True)
        return grad_UV.to(ctx.dtype), None, None, None, None


@torch.no_grad()
def vocab_parallel_collisions(
    logits_UV: Tensor, vocab_size: int, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """log of the sum over the vocabulary of the squared probabilities, float32 [U], no gradient.

    It is the log-probability that two draws from the distribution are the same token. `logits_UV`
    and `vocab_size` are as in `vocab_parallel_logps`.
    """
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    scores_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32), copy=True)
    scores_UV[:, max(vocab_size - rank * logits_UV.size(1), 0) :] = -torch.inf
    top_U = scores_UV.amax(dim=1)
    if size > 1:
        torch.distributed.all_reduce(top_U, torch.distributed.ReduceOp.MAX, group)
    exp_UV = scores_UV.sub_(top_U[:, None]).exp_()
    sums_2U = torch.stack([exp_UV.sum(dim=1), exp_UV.square_().sum(dim=1)])
    if size > 1:
        torch.distributed.all_reduce(sums_2U, group=group)
    return sums_2U[1].log() - 2 * sums_2U[0].log()


@torch.no_grad()
def vocab_parallel_scales(
    logits_UV: Tensor,
    logit_N: Tensor,
    target_N: Tensor,
    vocab_size: int,
    num_layers: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Size of what is rounded on the way to each target's log-probability, float32 [N], no
    gradient. The other arguments are as in `vocab_parallel_logps`.

        size_v = sqrt(logit_v^2 + num_layers * mean of logit^2)
        scale  = sqrt(sum over v of (d logp / d logit_v)^2 size_v^2),  d logp / d logit = onehot - p

    Times the relative rounding of the precision, it is by how much two ways to compute the
    log-probability may differ: a logit is rounded by its own size, and the hidden state in each
    layer, which moves a logit by a share of the logits' root mean square. All are independent. A
    token that is nearly certain has nearly no rounding, however large its logit.
    """
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    start = rank * logits_UV.size(1)
    scores_UV = logits_UV.to(torch.promote_types(logits_UV.dtype, torch.float32), copy=True)
    scores_UV[:, max(vocab_size - start, 0) :] = -torch.inf
    top_U = scores_UV.amax(dim=1)
    if size > 1:
        torch.distributed.all_reduce(top_U, torch.distributed.ReduceOp.MAX, group)
    probs_UV = scores_UV.sub_(top_U[:, None]).exp_()  # relative to the most likely; 0 at padding
    squares_UV = logits_UV.to(probs_UV.dtype).square()
    squares_UV[:, max(vocab_size - start, 0) :] = 0
    local_N = target_N - start
    is_local_N = (local_N >= 0) & (local_N < logits_UV.size(1))
    local_N = torch.where(is_local_N, local_N, 0)
    picked_2N = torch.stack([x[logit_N, local_N] for x in (probs_UV, squares_UV)]) * is_local_N
    sums = [probs_UV.sum(dim=1), squares_UV.sum(dim=1)]
    sums += [probs_UV.square_().sum(dim=1), probs_UV.mul_(squares_UV).sum(dim=1)]
    sums_4U = torch.stack(sums)
    if size > 1:
        torch.distributed.all_reduce(picked_2N, group=group)
        torch.distributed.all_reduce(sums_4U, group=group)
    # sum over v of p^2 size^2, and (1 - p)^2 - p^2 = 1 - 2 p for the target
    total_U, squares_U, collisions_U, weighted_U = sums_4U
    mean_U = num_layers / vocab_size * squares_U
    all_U = (weighted_U + mean_U * collisions_U) / total_U.square()
    prob_N, square_N = picked_2N[0] / total_U[logit_N], picked_2N[1]
    return (all_U[logit_N] + (1 - 2 * prob_N) * (square_N + mean_U[logit_N])).clamp(min=0).sqrt()


def vocab_parallel_logps(
    logits_UV: Tensor,
    logit_N: Tensor,
    target_N: Tensor,
    vocab_size: int,
    group: torch.distributed.ProcessGroup | None = None,
    is_fused: bool = False,
) -> Tensor:
    """Log-probability of `target_N[i]` under `logits_UV[logit_N[i]]`, [N].

    float32, also if the logits are less precise (float64 stays). `logits_UV` is this rank's slice
    of the vocabulary; columns from `vocab_size` on are padding and have probability 0. A (logit,
    target) entry may occur several times; each adds to the gradient. With `is_fused` Triton kernels
    compute the same, and `logit_N` has to ascend.
    """
    if is_fused:
        return FusedLogps.apply(logits_UV, logit_N, target_N, vocab_size, group)
    return _VocabParallelLogps.apply(logits_UV, logit_N, target_N, vocab_size, group)


def token_logps(
    hidden_UC: Tensor,
    project: Project,
    logit_N: Tensor,
    target_N: Tensor,
    *,
    vocab_size: int,
    chunk_size: int,
    offsets: np.ndarray | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    with_collisions: bool = False,
    scale_layers: int | None = None,
    is_fused: bool = False,
) -> Tensor:
    """Project hidden states to logits and take the targets' log-probabilities, float32 [N].

    With more lines than one, [lines, N]: after the log-probabilities come, with `with_collisions`,
    `vocab_parallel_collisions` of the token that predicts each target and, with `scale_layers` (the
    model's layers), `vocab_parallel_scales`.

    `logit_N` ascends. At most `chunk_size` tokens are projected at a time; if there are more,
    backward projects each chunk again, so that logits are freed with their chunk. Hidden state u
    predicts the targets `offsets[u]` up to, not including, `offsets[u + 1]`, [U + 1] on the host;
    without `offsets` they are computed from `logit_N`, which waits for the device. `is_fused` is
    that of `vocab_parallel_logps`.
    """

    def chunk_logps(hidden: Tensor, logit: Tensor, target: Tensor) -> Tensor:
        logits = project(hidden)
        logps = vocab_parallel_logps(logits, logit, target, vocab_size, group, is_fused)
        lines = [logps]
        if with_collisions:
            lines.append(vocab_parallel_collisions(logits, vocab_size, group)[logit])
        if scale_layers is not None:
            scales = vocab_parallel_scales(logits, logit, target, vocab_size, scale_layers, group)
            lines.append(scales)
        return torch.stack(lines) if len(lines) > 1 else logps

    num_logits = hidden_UC.size(0)
    if num_logits <= chunk_size:
        return chunk_logps(hidden_UC, logit_N, target_N)
    if offsets is None:
        offsets = np.searchsorted(logit_N.cpu().numpy(), np.arange(num_logits + 1))
    # offsets [0, 1, 3, 4, 6], chunks of 2 -> targets are cut at [0, 3, 6]
    cuts = [*offsets[:num_logits:chunk_size].tolist(), len(logit_N)]
    parts = [
        checkpoint(
            chunk_logps,
            hidden,
            logit_N[cuts[i] : cuts[i + 1]] - i * chunk_size,
            target_N[cuts[i] : cuts[i + 1]],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i, hidden in enumerate(hidden_UC.split(chunk_size))
    ]
    return torch.cat(parts, dim=-1)


def response_logps(token_logps_N: Tensor, order_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum each response's token log-probabilities in float64, in a fixed order, [R].

    `order_N` sorts the targets by response; response r has
    `order_N[offsets[r] : offsets[r + 1]]`.
    """
    ordered = token_logps_N.to(torch.float64)[order_N]
    return torch.segment_reduce(ordered, "sum", offsets=offsets, unsafe=True, initial=0.0)
