"""Bridge's forward step over rows of prefix trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

from megatron_prefix.bridge.settings import refuse
from megatron_prefix.engine import TrainBatch, preference_loss
from megatron_prefix.objectives import Objective


def preference_forward_step(data: Any) -> Callable[..., tuple[Tensor, Callable]]:
    """Bridge's `forward_step_func` for `preference_data`; Bridge injects `state` by its name."""

    def forward_step(
        state: Any, data_iterator: Any, model: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Callable]:
        config = state.cfg
        if return_schedule_plan:
            raise ValueError("return_schedule_plan: set model.overlap_moe_expert_parallel_comm off")
        refuse(_run_faults(config, data))
        if model.training:
            data.train.expect(state.train_state.step, get_num_microbatches())
        else:
            rows = config.validation.eval_global_batch_size // data.world.data_size
            data.valid.expect(None, rows)
        state.timers("batch-generator", log_level=2).start()
        with state.straggler_timer(bdata=True):
            batch = next(data_iterator)
        state.timers("batch-generator").stop()
        with state.straggler_timer:
            output = model(batch.tokens, None, None, packed_seq_params=batch.params)
        check = config.rerun_state_machine.check_for_nan_in_loss
        return output, partial(
            row_loss, batch=batch, objective=data.objective, check_for_nan_in_loss=check
        )

    return forward_step


def _run_faults(config: Any, data: Any) -> Iterator[str]:
    """Settings of the run, other than the model's, that would be ignored or count wrongly."""
    if config.train.micro_batch_size != 1:
        size = config.train.micro_batch_size
        yield f"train.micro_batch_size = {size}: a row is one micro batch; set it to 1"
    if config.rerun_state_machine.check_for_spiky_loss:
        yield "rerun_state_machine.check_for_spiky_loss = True: not followed; set it to False"
    if config.dist.use_megatron_fsdp or config.dist.use_torch_fsdp2:
        yield "dist.use_megatron_fsdp or dist.use_torch_fsdp2: use DistributedDataParallel"
    if config.dist.eval_context_parallel_size is not None:
        yield "dist.eval_context_parallel_size: rows are shared as in training; set it to None"
    if config.dataset is not data:
        yield "dataset is not the preference_data that this forward step was made for"


def row_loss(
    output: Tensor, *, batch: TrainBatch, objective: Objective, check_for_nan_in_loss: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, num_tokens = 0, metrics) of one row; see Division in the module's docstring.

    Each metric is (sum, count), which Bridge sums over rows and ranks before it divides: the loss
    over the row's part of the step's weight, everything else over what it is a mean of.
    """
    value, count, logs = preference_loss(output, batch=batch, objective=objective)
    if check_for_nan_in_loss:
        for test, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=value,
                rejection_func=test,
                message=f"found {name} in the loss of a row",
                tolerance=0.0,
                fatal=True,
            )
    unit = objective.members[0].unit
    own = batch.loss_inputs(value.detach().expand(len(batch.response_tokens))).denominators()[unit]
    part = own if batch.denominators is None else own / batch.denominators[unit]
    loss = {"loss": torch.stack([logs["loss"], part.to(logs["loss"])])}
    # Bridge averages each by itself, and these are not means
    means = {x: y for x, y in logs["sums"].items() if not x.startswith(("count/", "moments/"))}
    return value, torch.zeros_like(count), loss | means
