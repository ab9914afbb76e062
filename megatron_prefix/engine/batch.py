"""TrainBatch: a row on the device, as one micro batch of Megatron-Core's schedule takes it.

Shapes: T tokens, N targets, R responses of the row, P pairs of the row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention import TreePackedSeqParams, TreePlan
from megatron_prefix.attention.context_parallel import ContextShare
from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.platform import on_device


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """One row on the device: what `forward_step` takes from its iterator.

    tokens int64 [1, T]; `params` goes to the model. `response_order` [N] sorts the targets by
    response, and `response_offsets` [R + 1] is where each response's targets begin in that order.
    response_tokens int64 [R] counts each response's own tokens; pairs int64 [P, 2] index the row's
    responses; pair_weights and pair_margins float64 [P], a margin NaN if the data has none;
    step_weight is what the step's loss is divided by; ref_logps float64 [R], None if there is no
    reference. With `params.share`, tokens and targets are those that this rank owns; responses
    and pairs are always the whole row's.
    """

    tokens: Tensor
    params: TreePackedSeqParams
    response_order: Tensor
    response_offsets: Tensor
    response_tokens: Tensor
    pairs: Tensor
    pair_weights: Tensor
    pair_margins: Tensor
    step_weight: float
    ref_logps: Tensor | None = None

    def with_reference(self, ref_logps: Tensor) -> TrainBatch:
        return replace(self, ref_logps=ref_logps)

    def with_step_count(self, step_count: float) -> TrainBatch:
        return replace(self, params=replace(self.params, step_count=step_count))


def to_device(
    batch: MicroBatch,
    device: torch.device,
    step_weight: float = 1.0,
    *,
    step_count: float = 0.0,
    share: ContextShare | None = None,
) -> TrainBatch:
    """Move a row, or this rank's part of it, to `device` and plan its attention, once for all
    layers. The host does not wait for copies from pinned memory to CUDA.

    `step_count` is for an auxiliary loss of experts; see TreePackedSeqParams.
    """
    own = np.arange(len(batch.tokens)) if share is None else share.tokens
    is_own = np.isin(batch.logit_token, own)
    response = batch.response[is_own]
    # Tokens that predict several targets are projected once. Their indices in the row,
    # [2, 2, 5] of three targets, become the distinct [2, 5] and, per target, [0, 0, 1].
    logit_tokens, logit_of_target = np.unique(batch.logit_token[is_own], return_inverse=True)
    # Targets of the responses [1, 0, 1] -> order [1, 0, 2], offsets [0, 1, 3].
    order = np.argsort(response, kind="stable")
    counts = np.bincount(response, minlength=batch.num_responses)
    served = None if batch.served is None else batch.served[own]

    tensor = partial(on_device, device=device)
    return TrainBatch(
        tokens=tensor(batch.tokens[own])[None],
        params=TreePackedSeqParams(
            plan=TreePlan(batch.layout, device) if share is None else share.plan,
            share=share,
            position_ids=tensor(batch.layout.position_ids()[own]),
            logit_tokens=tensor(np.searchsorted(own, logit_tokens)),
            logit_of_target=tensor(logit_of_target),
            target_offsets=np.searchsorted(logit_of_target, np.arange(len(logit_tokens) + 1)),
            target_tokens=tensor(batch.target_token[is_own]),
            responses_served=None if served is None else tensor(served).float(),
            step_count=step_count,
        ),
        response_order=tensor(order),
        response_offsets=tensor(np.concatenate([[0], np.cumsum(counts)])),
        response_tokens=tensor(batch.response_tokens),
        pairs=tensor(batch.pairs),
        pair_weights=tensor(batch.pair_weights),
        pair_margins=tensor(batch.pair_margins),
        step_weight=step_weight,
    )
