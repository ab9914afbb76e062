"""Log-probabilities of targets by Triton kernels; `vocab_parallel_logps` in logps.py defines them.

The elementary form keeps the probabilities in float32 for backward, twice the memory of bfloat16
logits, and reads the logits nine times. This one keeps the logits themselves, reads them once
forward and once backward, and writes the gradient once.

Shapes: U tokens with logits, N targets, V vocabulary (local).
"""

from __future__ import annotations

import torch


class FusedLogps(torch.autograd.Function):
    """log softmax(logits)[logit, target] with the vocabulary split over a process group; `logit_N`
    ascends."""

    @staticmethod
    def forward(ctx, logits_UV, logit_N, target_N, vocab_size, group):
        from megatron_prefix.kernels import row_statistics  # needs Triton

        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        start = rank * logits_UV.size(1)
        columns = min(max(vocab_size - start, 0), logits_UV.size(1))
        own_top_U, sum_U = row_statistics(logits_UV, columns)
        top_U = own_top_U
        if size > 1:
            top_U = own_top_U.clone()
            torch.distributed.all_reduce(top_U, torch.distributed.ReduceOp.MAX, group)
            # ranks with maxima 3 and 5: the sum of the first was relative to 3, so times e^-2
            sum_U = sum_U * torch.exp(own_top_U - top_U)
            torch.distributed.all_reduce(sum_U, group=group)
        local_N = target_N - start
        is_local_N = (local_N >= 0) & (local_N < logits_UV.size(1))
        local_N = torch.where(is_local_N, local_N, 0)
        picked_N = logits_UV[logit_N, local_N].float() - top_U[logit_N]
        picked_N = torch.where(is_local_N, picked_N, 0)
        if size > 1:
            torch.distributed.all_reduce(picked_N, group=group)
        local_N = torch.where(is_local_N, local_N, -1)
        ctx.save_for_backward(logits_UV, logit_N, local_N, top_U, sum_U)
        ctx.columns = columns
        return picked_N - sum_U.log()[logit_N]

    @staticmethod
    def backward(ctx, grad_N):
        from megatron_prefix.kernels import softmax_gradient

        logits_UV, logit_N, local_N, top_U, sum_U = ctx.saved_tensors
        grad_N = grad_N.contiguous()
        weight_U = top_U.new_zeros(len(top_U)).index_put_((logit_N,), grad_N, accumulate=True)
        rows = torch.arange(len(top_U) + 1, device=logit_N.device)
        offsets = torch.searchsorted(logit_N, rows)
        grad_UV = softmax_gradient(
            logits_UV, ctx.columns, top_U, sum_U, weight_U, offsets, local_N, grad_N
        )
        return grad_UV, None, None, None, None
