"""One step: rows onto the device, through Megatron-Core's schedule, to one weighted loss.

The loss is a sum over the global batch's pairs divided by their weights' sum, which the step
plan knows beforehand. So nothing is divided by micro batches, tokens or ranks: data
parallelism adds gradients up, and the result does not depend on how pairs were packed.

Shapes: T tokens, N targets, R responses of the row, P pairs of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.parallel_state import (
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_last_rank,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prefix.attention.context_parallel.transports import ContextParallel
from megatron_prefix.attention.megatron import TreePackedSeqParams
from megatron_prefix.attention.plan import TreePlan
from megatron_prefix.config.schema import LossConfig
from megatron_prefix.data.steps.collate import MicroBatch
from megatron_prefix.model.logps import response_logps
from megatron_prefix.objectives.objective import pair_metrics, pair_rewards
from megatron_prefix.platform.transfer import on_device


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """One row on the device: what `forward_step` takes from its iterator.

    tokens int64 [1, T]; `params` goes to the model; target i belongs to the response that
    `response_order` and `response_offsets` sort it under; pairs int64 [P, 2] index the row's
    responses; pair_weights and pair_margins float64 [P], a margin NaN where the data has none;
    ref_logps float64 [R] or None where there is no reference; step_weight is the step's
    normaliser. With `context`, tokens and targets are those that this rank owns, and responses
    and pairs the whole row's.
    """

    tokens: Tensor
    params: TreePackedSeqParams
    response_order: Tensor
    response_offsets: Tensor
    pairs: Tensor
    pair_weights: Tensor
    pair_margins: Tensor
    step_weight: float
    ref_logps: Tensor | None = None
    context: ContextParallel | None = None

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
    context: ContextParallel | None = None,
) -> TrainBatch:
    """Move a row, or this rank's part of it, to `device` and plan its attention, once for all
    layers; from pinned memory to CUDA, so that nobody waits for the copies.

    `step_count` is for an auxiliary loss of experts; see TreePackedSeqParams.
    """
    share = None if context is None else context.share(batch.layout, device)
    own = np.arange(len(batch.tokens)) if share is None else share.rows
    is_own = np.isin(batch.source_row, own)
    response = batch.response[is_own]
    rows, target_rows = np.unique(batch.source_row[is_own], return_inverse=True)
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
            projected_rows=tensor(np.searchsorted(own, rows)),
            target_rows=tensor(target_rows),
            target_offsets=np.searchsorted(target_rows, np.arange(len(rows) + 1)),
            target_tokens=tensor(batch.target_token[is_own]),
            responses_served=None if served is None else tensor(served).float(),
            step_count=step_count,
        ),
        response_order=tensor(order),
        response_offsets=tensor(np.concatenate([[0], np.cumsum(counts)])),
        pairs=tensor(batch.pairs),
        pair_weights=tensor(batch.pair_weights),
        pair_margins=tensor(batch.pair_margins),
        step_weight=step_weight,
        context=context,
    )


def forward_step(
    data_iterator: Iterator[TrainBatch], model: torch.nn.Module, *, loss: LossConfig
) -> tuple[Tensor, Callable]:
    """Megatron-Core's forward step: token log-probabilities, or a reward model's scores, and what
    makes a loss of them."""
    batch = next(data_iterator)
    output = model(batch.tokens, None, None, packed_seq_params=batch.params)
    return output, partial(preference_loss, batch=batch, loss=loss)


def preference_loss(
    token_logps: Tensor, *, batch: TrainBatch, loss: LossConfig, non_loss_data: bool = False
) -> Tensor | tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Share of the step's loss that this row has, with its pair count and sums for logging.

    With `non_loss_data` the row's response log-probabilities, float64 [R], and nothing else. A
    reward model's score takes the place of a response's log-probability.
    """
    logps = response_logps(token_logps, batch.response_order, batch.response_offsets)
    if batch.context is not None:
        logps = batch.context.sum(logps)
    if non_loss_data:
        return logps.detach()
    pairs = pair_rewards(loss, logps, batch.ref_logps, batch.pairs, batch.pair_margins)
    weighted = (batch.pair_weights * pairs.losses).sum()
    chosen, rejected = batch.pairs.unbind(1)
    values = (pairs.chosen, pairs.rejected, pairs.margins, pairs.accuracies)
    values += (logps[chosen], logps[rejected])
    sums = [weighted, *(x.sum() for x in values)][: len(pair_metrics(loss))]
    logs = {"sums": torch.stack([x.detach() for x in sums])}
    if batch.ref_logps is not None:
        logs["rewards"] = torch.cat([pairs.chosen, pairs.rejected]).abs()
        logs["ref_logps"] = batch.ref_logps[torch.cat([chosen, rejected])].abs()
    is_first = batch.context is None or batch.context.group.rank() == 0  # it counts for all
    num_pairs = len(batch.pairs) if is_first else 0
    count = torch.full((), num_pairs, dtype=torch.int, device=token_logps.device)
    return weighted / batch.step_weight, count, logs


def sum_gradients(model: list, num_tokens: Tensor | None = None, **kwargs: object) -> None:
    """Megatron-Core's gradient finalisation without its division by a token count."""
    finalize_model_grads(model, None, **kwargs)


def run_schedule(
    model: Sequence[torch.nn.Module],
    batches: Iterable[TrainBatch],
    loss: LossConfig,
    *,
    forward_only: bool = False,
) -> list:
    """Run rows through Megatron-Core's schedule for the current process groups.

    Returns `preference_loss`'s logs of every row after forward and backward, or with
    `forward_only` its response log-probabilities, in the order of the rows and on every
    pipeline stage.
    """
    batches = list(batches)
    with torch.set_grad_enabled(not forward_only):
        found = get_forward_backward_func()(
            forward_step_func=partial(forward_step, loss=loss),
            data_iterator=[iter(batches) for _ in model],
            model=list(model),
            num_microbatches=len(batches),
            seq_length=max(batch.tokens.size(1) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    return from_last_stage(found, batches[0].tokens.device)


def from_last_stage(found: list, device: torch.device) -> list:
    """What the last pipeline stage found, on every stage; tensors come back on `device`."""
    group = get_pipeline_model_parallel_group()
    if group.size() == 1:
        return found
    last = get_pipeline_model_parallel_last_rank()
    values = [_moved(found, torch.device("cpu")) if dist.get_rank() == last else None]
    dist.broadcast_object_list(values, src=last, group=group)
    return _moved(values[0], device)


def _moved(value: object, device: torch.device) -> object:
    """Lists and dictionaries of tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(x, device) for key, x in value.items()}
    return [_moved(x, device) for x in value]
