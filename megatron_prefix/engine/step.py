"""One step: rows through Megatron-Core's schedule to one weighted loss, or to scores.

The loss is a sum over the global batch's pairs, sets, responses or tokens, divided by their weight,
which is known before the step. So nothing is divided by micro batches, tokens or ranks: data
parallelism adds the gradients, and the result does not depend on how the data was packed.

Shapes: T tokens, N targets, R responses of the row, P pairs of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prefix.config import LossConfig
from megatron_prefix.engine.batch import TrainBatch
from megatron_prefix.engine.pipeline import (
    from_last_stage,
    schedule_arguments,
    scores_from_last_stage,
)
from megatron_prefix.model import response_logps
from megatron_prefix.objectives import LossInputs, Objective, check

Forward = Callable[[Iterator[TrainBatch], torch.nn.Module], tuple[Tensor, Callable]]
"""Megatron-Core's forward step: the model's output, and a function that makes a loss of it."""
Chooser = Callable[[Tensor], Tensor]
"""Logits [R, vocabulary] -> a token for each, int64 [R]."""


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
    is_first: bool = False,
    with_noise: bool = False,
) -> tuple[Tensor, Callable]:
    """`forward_step` with a checked objective; without one, rows can only be scored, `with_noise`
    as `noisy_scores` returns it."""
    batch = next(data_iterator)
    output = model(batch.tokens, None, None, **batch.model_inputs)

    def loss_function(token_logps: Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            scores = response_scores(token_logps, batch).detach()
            if not with_noise:
                return scores
            return {"scores": scores, "noise": response_noise(token_logps, batch)}
        if batch.slopes is not None:
            return sloped_loss(token_logps, batch, is_first)
        assert objective is not None, "a loss needs an objective"
        return preference_loss(token_logps, batch=batch, objective=objective, is_first=is_first)

    return output, loss_function


def response_scores(token_logps: Tensor, batch: TrainBatch) -> Tensor:
    """Log-probability of each response of the row, float64 [R], or a reward model's score of it,
    and what `batch.parts` adds, in one vector; summed over the context-parallel ranks that share
    the row. `token_logps` is [N], or [lines, N] with the targets' collisions or scales (logps.py),
    or with a line for each attribute (heads.py).
    """
    parts = batch.parts
    logps = token_logps[parts.attribute] if token_logps.dim() > 1 else token_logps
    columns = [response_logps(logps, batch.response_order, batch.response_offsets)]
    if parts.num_labels > 1:
        columns += [
            response_logps(line, batch.response_order, batch.response_offsets)
            for line in token_logps[: parts.num_labels]
        ]
    if batch.head_order is not None and batch.head_offsets is not None:
        columns.append(response_logps(logps, batch.head_order, batch.head_offsets))
    if batch.parts.alignments:
        excess = (token_logps[0] - token_logps[1]).detach()
        sums = response_logps(excess, batch.response_order, batch.response_offsets)
        columns.append(sums / batch.response_tokens)
    scores = torch.cat(columns)
    share = batch.params.share
    return scores if share is None else share.sum(scores)


def response_noise(token_logps: Tensor, batch: TrainBatch) -> Tensor:
    """By how much two ways to compute each response's score may differ, in units of the relative
    rounding of the precision: the root of the sum over its tokens of their squared scales, float64
    [R]. It is 0 if the head gave no scales. The roundings of tokens are independent."""
    if not batch.params.with_scales:
        return torch.zeros(len(batch.response_tokens), device=token_logps.device).double()
    squares = token_logps[-1].detach().double().square()
    sums = response_logps(squares, batch.response_order, batch.response_offsets)
    share = batch.params.share
    return (sums if share is None else share.sum(sums)).sqrt()


def preference_loss(
    token_logps: Tensor, *, batch: TrainBatch, objective: Objective, is_first: bool = False
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This row's share of the step's loss, its pair count, and its values for logging:

    loss       the share, without gradient
    scores     what `response_scores` returns, without gradient
    sums       name -> [2]: sum and count, whose totals over rows and ranks give the step's mean
    extremes   name -> largest value of the row

    With `is_first`, if there is a reference, what the first step is checked by:

    start      share of the loss that the step has if the policy is the reference
    slopes     |slope| of that share for each response's log-probability [R]
    logratios  |logp - ref_logp| of each response [R]
    noise      `response_noise` of the same
    """
    if objective.needs_step:
        raise ValueError(
            f"loss.loss_type: {objective.name} looks at the whole step, and a row has only its own "
            "responses: use Trainer, which runs a step in two passes"
        )
    if batch.is_divided:
        raise ValueError(
            "data.oversized: split: responses of one pair or set of this step lie in several rows, "
            "and a row has only its own: use Trainer, which runs such a step in two passes"
        )
    scores = response_scores(token_logps, batch)
    inputs = batch.loss_inputs(scores)
    value, logs = objective_logs(objective, inputs, batch.denominators)
    logs["scores"] = scores.detach()
    if is_first and batch.ref_logps is not None:
        logs["start"], logs["slopes"] = objective.start(inputs, batch.denominators)
        logs |= _first_logs(token_logps, inputs.scores, batch)
    return value, _pair_count(batch, token_logps.device), logs


def objective_logs(
    objective: Objective,
    inputs: LossInputs,
    denominators: Mapping[str, float] | None,
) -> tuple[Tensor, dict[str, Any]]:
    """A table's share of the step's loss, and its `loss`, `sums` and `extremes` as
    `preference_loss` returns them."""
    value, sums = objective.loss(inputs, denominators)
    logs: dict[str, Any] = {
        "loss": value.detach(),
        "sums": sums,
        "extremes": objective.extremes(inputs),
    }
    return value, logs


def sloped_loss(
    token_logps: Tensor, batch: TrainBatch, is_first: bool = False
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The row's sum of slope times score, whose gradient is that of the step's loss, its pair
    count, and for logging `scores`: what `response_scores` returns, without gradient. With
    `is_first` also `logratios` and `noise`, as `preference_loss` returns them."""
    assert batch.slopes is not None
    scores = response_scores(token_logps, batch)
    logs = {"scores": scores.detach()}
    if is_first and batch.ref_logps is not None:
        logs |= _first_logs(token_logps, scores[: len(batch.response_tokens)], batch)
    return (batch.slopes * scores).sum(), _pair_count(batch, token_logps.device), logs


def _first_logs(token_logps: Tensor, scores: Tensor, batch: TrainBatch) -> dict[str, Tensor]:
    assert batch.ref_logps is not None
    return {
        "logratios": (scores.detach() - batch.ref_logps).abs(),
        "noise": response_noise(token_logps, batch),
    }


def _pair_count(batch: TrainBatch, device: torch.device) -> Tensor:
    share = batch.params.share
    counts_pairs = share is None or share.group.rank() == 0  # one rank of those that share the row
    return torch.full((), len(batch.pairs) if counts_pairs else 0, dtype=torch.int, device=device)


def sum_gradients(model: list, num_tokens: Tensor | None = None, **kwargs: object) -> None:
    """Megatron-Core's gradient finalisation without its division by a token count."""
    finalize_model_grads(model, None, **kwargs)


def run_schedule(
    model: Sequence[torch.nn.Module],
    batches: Sequence[TrainBatch],
    objective: Objective,
    is_first: bool = False,
) -> list[dict[str, Any]]:
    """Forward and backward over rows; `preference_loss`'s values of every row, in their order and
    on every pipeline stage."""
    forward = partial(_forward, objective=objective, is_first=is_first)
    with torch.enable_grad():
        logs = _schedule(forward, model, batches)
    return from_last_stage(logs, batches[0].tokens.device)


def score_rows(model: Sequence[torch.nn.Module], batches: Sequence[TrainBatch]) -> list[Tensor]:
    """Forward over rows without gradients; `response_scores` of every row, in their order and on
    every pipeline stage."""
    with torch.no_grad():
        scores = _schedule(_forward, model, batches, forward_only=True, collect_non_loss_data=True)
    sizes = [batch.num_scores for batch in batches]
    return scores_from_last_stage(scores, sizes, batches[0].tokens.device)


def next_tokens(
    model: Sequence[torch.nn.Module], batches: Sequence[TrainBatch], choose: Chooser
) -> list[list[int]]:
    """Forward over rows whose responses have one target each, and for every row the tokens that
    `choose` takes for its responses, in their order and on every pipeline stage."""

    def forward(iterator: Iterator[TrainBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = next(iterator)
        output = chunk(batch.tokens, None, None, **batch.model_inputs)
        return output, lambda logits, non_loss_data: choose(_of_responses(logits, batch))

    own = [replace(b, params=replace(b.params, with_logits=True)) for b in batches]
    with torch.no_grad():
        chosen = _schedule(forward, model, own, forward_only=True, collect_non_loss_data=True)
    rows = from_last_stage(chosen, batches[0].tokens.device)
    return [row.tolist() for row in rows]


def _of_responses(logits_UV: Tensor, batch: TrainBatch) -> Tensor:
    """Logits of the token before each response's only target, float32 [R, vocabulary]; of a row
    that context-parallel ranks share, each has those of its own tokens."""
    # responses 0 and 1 are predicted by the logits 1 and 0: logit_of_target [0 1], order [1 0]
    assert batch.params.logit_of_target is not None, "the row was made by to_device"
    counts = batch.response_offsets.diff()
    logits_RV = logits_UV.new_zeros(len(counts), logits_UV.shape[-1])
    logits_RV[counts > 0] = logits_UV[batch.params.logit_of_target[batch.response_order]]
    share = batch.params.share
    return logits_RV if share is None else share.sum(logits_RV)


def noisy_scores(
    model: Sequence[torch.nn.Module], batches: Sequence[TrainBatch]
) -> list[dict[str, Tensor]]:
    """`score_rows` with, beside the `scores` of every row, the `noise` of its responses."""
    forward = partial(_forward, with_noise=True)
    batches = [batch.with_scales() for batch in batches]
    with torch.no_grad():
        values = _schedule(forward, model, batches, forward_only=True, collect_non_loss_data=True)
    return from_last_stage(values, batches[0].tokens.device)


def _schedule(
    forward: Forward,
    model: Sequence[torch.nn.Module],
    batches: Sequence[TrainBatch],
    **options: bool,
) -> list:
    """Run rows through Megatron-Core's schedule for the current process groups. What the last
    pipeline stage collects; nothing on the others."""
    lengths = [batch.tokens.size(1) for batch in batches]
    return get_forward_backward_func()(
        forward_step_func=forward,
        # Every chunk of this rank reads all rows, so each needs an iterator of its own.
        data_iterator=[iter(batches) for _ in model],
        model=list(model),
        num_microbatches=len(batches),
        seq_length=max(lengths),
        micro_batch_size=1,
        **schedule_arguments(model[0], lengths),
        **{"forward_only": False, **options},
    )
