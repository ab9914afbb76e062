"""One step: rows through Megatron-Core's schedule to one weighted loss, or to scores.

The loss is a sum over the global batch's pairs divided by the sum of their weights, which is known
before the step. So nothing is divided by micro batches, tokens or ranks: data parallelism adds
the gradients, and the result does not depend on how pairs were packed.

Shapes: T tokens, N targets, R responses of the row, P pairs of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.parallel_state import (
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_last_rank,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prefix.config import LossConfig
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.model import response_logps
from megatron_prefix.objectives import LossInputs, Objective, check

Forward = Callable[[Iterator[TrainBatch], torch.nn.Module], tuple[Tensor, Callable]]
"""Megatron-Core's forward step: the model's output, and a function that makes a loss of it."""


def forward_step(
    data_iterator: Iterator[TrainBatch], model: torch.nn.Module, *, loss: LossConfig
) -> tuple[Tensor, Callable]:
    """Megatron-Core's forward step for a loop of your own, with the objective of `loss`.

    The loss function that comes with the output returns what `preference_loss` does; called with
    `non_loss_data=True`, as a schedule with `collect_non_loss_data=True` does, it returns the row's
    `response_scores` [R], without gradient. Raises InputError if `loss` is not a valid loss
    section.
    """
    return _forward(data_iterator, model, objective=check(loss))


def _forward(
    data_iterator: Iterator[TrainBatch],
    model: torch.nn.Module,
    *,
    objective: Objective | None = None,
) -> tuple[Tensor, Callable]:
    """`forward_step` with a checked objective; without one, rows can only be scored."""
    batch = next(data_iterator)
    output = model(batch.tokens, None, None, packed_seq_params=batch.params)

    def loss_function(token_logps: Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            return response_scores(token_logps, batch).detach()
        assert objective is not None, "a loss needs an objective"
        return preference_loss(token_logps, batch=batch, objective=objective)

    return output, loss_function


def response_scores(token_logps: Tensor, batch: TrainBatch) -> Tensor:
    """Log-probability of each response of the row, float64 [R], or a reward model's score of it;
    summed over the context-parallel ranks that share the row."""
    scores = response_logps(token_logps, batch.response_order, batch.response_offsets)
    share = batch.params.share
    return scores if share is None else share.sum(scores)


def preference_loss(
    token_logps: Tensor, *, batch: TrainBatch, objective: Objective
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This row's share of the step's loss, its pair count, and its values for logging:

    sums       name -> sum over the row's pairs; "loss" is weighted, metrics are not
    logratios  |logp - ref_logp| of both sides of each pair [2P], if there is a reference
    ref_logps  |ref_logp| of the same
    tokens     their numbers of own tokens
    """
    scores = response_scores(token_logps, batch)
    inputs = LossInputs(
        scores=scores,
        ref_logps=batch.ref_logps,
        num_tokens=batch.response_tokens,
        pairs=batch.pairs,
        margins=batch.pair_margins,
    )
    outputs = objective.outputs(inputs)
    # Weights [1, 3], losses [0.5, 0.1], a step weight of 8: this row adds (0.5 + 0.3) / 8 = 0.1 to
    # the step's loss.
    weighted = (batch.pair_weights * outputs.losses).sum()
    metrics = outputs.metrics | objective.logp_metrics(inputs)
    sums = {"loss": weighted.detach()} | {name: x.sum() for name, x in metrics.items()}
    logs: dict[str, Any] = {"sums": sums}
    if batch.ref_logps is not None:
        # Pairs [[0, 1], [0, 2]] -> sides [0, 0, 1, 2]: chosen responses, then rejected ones
        sides = torch.cat(batch.pairs.unbind(1))
        logs["logratios"] = (scores.detach() - batch.ref_logps)[sides].abs()
        logs["ref_logps"] = batch.ref_logps[sides].abs()
        logs["tokens"] = batch.response_tokens[sides]
    share = batch.params.share
    counts_pairs = share is None or share.group.rank() == 0  # one rank of those that share the row
    num_pairs = len(batch.pairs) if counts_pairs else 0
    count = torch.full((), num_pairs, dtype=torch.int, device=token_logps.device)
    return weighted / batch.step_weight, count, logs


def sum_gradients(model: list, num_tokens: Tensor | None = None, **kwargs: object) -> None:
    """Megatron-Core's gradient finalisation without its division by a token count."""
    finalize_model_grads(model, None, **kwargs)


def run_schedule(
    model: Sequence[torch.nn.Module], batches: Sequence[TrainBatch], objective: Objective
) -> list[dict[str, Any]]:
    """Forward and backward over rows; `preference_loss`'s values of every row, in their order and
    on every pipeline stage."""
    with torch.enable_grad():
        logs = _schedule(partial(_forward, objective=objective), model, batches)
    return from_last_stage(logs, batches[0].tokens.device)


def score_rows(model: Sequence[torch.nn.Module], batches: Sequence[TrainBatch]) -> list[Tensor]:
    """Forward over rows without gradients; `response_scores` of every row, in their order and on
    every pipeline stage."""
    with torch.no_grad():
        scores = _schedule(_forward, model, batches, forward_only=True, collect_non_loss_data=True)
    return from_last_stage(scores, batches[0].tokens.device)


def _schedule(
    forward: Forward,
    model: Sequence[torch.nn.Module],
    batches: Sequence[TrainBatch],
    **options: bool,
) -> list:
    """Run rows through Megatron-Core's schedule for the current process groups. What the last
    pipeline stage collects; nothing on the others."""
    return get_forward_backward_func()(
        forward_step_func=forward,
        # Every chunk of this rank reads all rows, so each needs an iterator of its own.
        data_iterator=[iter(batches) for _ in model],
        model=list(model),
        num_microbatches=len(batches),
        seq_length=max(batch.tokens.size(1) for batch in batches),
        micro_batch_size=1,
        **{"forward_only": False, **options},
    )


def from_last_stage(values: list, device: torch.device) -> list:
    """What the last pipeline stage has, on every stage; tensors come back on `device`."""
    group = get_pipeline_model_parallel_group()
    if group.size() == 1:
        return values
    last = get_pipeline_model_parallel_last_rank()
    # A pickled CUDA tensor would return on the sender's device number, so tensors travel on the
    # CPU.
    shared = [_moved(values, torch.device("cpu")) if dist.get_rank() == last else None]
    dist.broadcast_object_list(shared, src=last, group=group)
    return _moved(shared[0], device)


def _moved(value: Any, device: torch.device) -> Any:
    """Lists and dictionaries of tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(x, device) for key, x in value.items()}
    return [_moved(x, device) for x in value]
