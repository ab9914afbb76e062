"""What a configuration asks of a cluster, before there is one: `megatron-prefix plan`.

1. Sizes: from the configuration, or from `config.json` of a model that is on this machine.
2. Memory of a rank and pipeline bubble, by the formulas of memory.py.
3. If the data set is on this machine: its first steps, under every sharing mode, in tokens and
   in operations (flops.py), and so whether sharing pays.
4. For a named GPU: whether a rank fits it, seconds of a step and hours of the run (run_time.py).
5. Advice (advice.py).

What cannot be known is listed under `missing`, with its remedy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from megatron_prefix.config import Config, ModelConfig
from megatron_prefix.distributed import world_faults
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.adapters import adapter_counts
from megatron_prefix.estimate.advice import (
    batch_advice,
    fill_advice,
    recompute_advice,
    reference_advice,
)
from megatron_prefix.estimate.attention import PathShare
from megatron_prefix.estimate.data_costs import (
    KnownModel,
    data_plan,
    planned_sampler,
    sharing_advice,
)
from megatron_prefix.estimate.hardware import (
    GIB,
    Hardware,
    check_dtype,
    fit,
    with_recomputation,
)
from megatron_prefix.estimate.known import (
    known_dataset,
    known_model,
    row_bound,
    with_adapters,
    with_images,
)
from megatron_prefix.estimate.memory import parameter_counts, pipeline_bubble
from megatron_prefix.estimate.planned_run import PlannedRun
from megatron_prefix.estimate.run_time import run_time
from megatron_prefix.objectives import check


def plan_run(
    config: Config, world_size: int | None = None, machine: Hardware | None = None
) -> dict[str, Any]:
    """Everything that `plan` prints, ready for JSON; `world_size` is by default the smallest number
    of processes that the layout takes. Whether it fits and how long it takes are known of a
    `machine`. Raises InputError if the layout divides neither the model nor `world_size`."""
    check_dtype(machine, config.model)
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    parallel = config.parallel
    stages = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    if world_size is None:
        # The context and the expert parallel size both divide the ranks that the stages leave, and
        # may overlap: 2 and 4 need 4, not 8.
        world_size = stages * math.lcm(context, parallel.expert_model_parallel_size)
    if faults := list(world_faults(parallel, world_size)):
        raise InputError(f"--world-size: {faults[0]}")
    missing: list[str] = []
    dataset = known_dataset(config, missing)
    model = known_model(config.model, dataset, missing)
    if model is not None:
        parallel.check_model(config.model, model.sizes)
        model = with_adapters(config, model, missing)
    if model is not None:
        model = with_images(config, model, dataset)
    ranks = world_size // (stages * context)
    plan: dict[str, Any] = {
        "world_size": world_size,
        "data_parallel_size": ranks,
        "parameters": None,
        "trained_parameters": None,
        "memory": None,
        "data": None,
        "pipeline": None,
        "verdict": None,
        "fit": None,
        "time": None,
        "advice": [],
        "missing": missing,
    }
    rows, row_tokens = None, row_bound(config)
    if dataset is not None:
        sampler = planned_sampler(config, objective, dataset, ranks, model)
        plan["data"] = data_plan(config, sampler, model)
        rows = plan["data"]["rows_per_rank"]
        row_tokens = row_tokens or plan["data"]["longest_row"]
        plan["verdict"] = sharing_advice(config.data.sharing, plan["data"]["sharing"])
        plan["pipeline"] = {"rows_per_rank": rows, "bubble": pipeline_bubble(parallel, rows)}
    if row_tokens is None:
        missing.append("data.row_capacity is not set: only the data tells the longest row")
    if model is not None and model.vocab_size is not None:
        plan["parameters"], plan["trained_parameters"] = _parameters(config.model, model)
        if row_tokens is not None:
            costs = plan["data"] and plan["data"]["sharing"].get(config.data.sharing)
            run = PlannedRun(
                config,
                objective,
                model,
                world_size,
                row_tokens,
                rows,
                PathShare.of_costs(costs),
                (plan["data"] or {}).get("kept_of_images", 0),
            )
            plan["memory"] = run.memory(config.model)
            _judge(plan, run, machine)
    if machine is not None and machine.gpu is not None and plan["time"] is None:
        missing.append("time: it needs the model's sizes and the data set")
    if plan["data"] is not None:
        bubble = plan["pipeline"]["bubble"]
        plan["advice"] += [*batch_advice(config, plan["data"], bubble, ranks)]
        plan["advice"] += fill_advice(config, plan["data"])
    return plan


def _parameters(config: ModelConfig, model: KnownModel) -> tuple[dict[str, int], int]:
    """Parameters by component, and how many are trained; the vocabulary is known."""
    assert model.vocab_size is not None, "known before parameters are"
    kind = config.kind, config.num_labels
    counts = parameter_counts(model.sizes, model.vocab_size, *kind)
    trained = sum(counts.values())
    if model.lora is not None:
        counts |= adapter_counts(model.lora, model.sizes, model.vocab_size, *kind)
        trained = counts.pop("trained")
    if model.vision is not None:
        counts |= model.vision.counts
        trained += model.vision.trained
    return counts, trained


def _judge(plan: dict[str, Any], run: PlannedRun, machine: Hardware | None) -> None:
    """Add to `plan` whether the run fits, how long it takes, and advice on both."""
    job, data, parallel = run.job(machine), plan["data"], run.config.parallel
    mode = run.mode
    if job is not None and data is not None:
        plan["time"] = run_time(job, parallel, data, mode)
    time, model = plan["time"], run.config.model
    if machine is not None:
        plan["fit"] = fit(machine, plan["memory"])
        if model.recompute_granularity is not None:
            without = with_recomputation(model, None)
            needed = fit(machine, run.memory(without))["needed_gib"]
            saved = None
            if job is not None and time is not None:
                faster = run_time(replace(job, model=without), parallel, data, mode)
                saved = 1 - faster["seconds_per_step"] / time["seconds_per_step"]
            plan["advice"] += recompute_advice(needed, machine.usable_gib, saved)
    if run.objective.reference == "model" and run.known.lora is None:
        gib = max(stage["reference"] for stage in plan["memory"]["stages"]) / GIB
        share = None if time is None else time["seconds"]["reference"] / time["seconds_per_step"]
        plan["advice"] += reference_advice(run.config, gib, share)
