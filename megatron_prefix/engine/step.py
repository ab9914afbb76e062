"""One step: rows onto the device, through Megatron-Core's schedule, to one weighted loss.

The loss is a sum over the global batch's pairs divided by their weights' sum, which the step
plan knows beforehand. So nothing is divided by micro batches, tokens or ranks: data
parallelism adds gradients up, and the result does not depend on how pairs were packed.

Shapes: T tokens, N targets, R responses of the row, P pairs of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.parallel_state import (
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_last_rank,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prefix.config.schema import LossConfig
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.model.logps import response_logps
from megatron_prefix.objectives.objective import pair_metrics, pair_rewards


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
    share = batch.params.share
    if share is not None:
        logps = share.sum(logps)
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
    is_first = share is None or share.group.rank() == 0  # it counts for all
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
