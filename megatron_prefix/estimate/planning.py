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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prefix.config import Config, ModelConfig
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.data.store.verify import verify_tokens
from megatron_prefix.distributed import world_faults
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.adapters import (
    adapted_host_gradients,
    adapted_memory,
    adapter_counts,
)
from megatron_prefix.estimate.advice import (
    batch_advice,
    fill_advice,
    recompute_advice,
    reference_advice,
)
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
from megatron_prefix.estimate.memory import (
    RankMemory,
    host_gradients,
    parameter_counts,
    pipeline_bubble,
    rank_memory,
)
from megatron_prefix.estimate.run_time import run_time
from megatron_prefix.estimate.step_time import Job
from megatron_prefix.model.hf import HFModel
from megatron_prefix.objectives import Objective, check


@dataclass(frozen=True)
class PlannedRun:
    """A run whose model and longest row are known."""

    config: Config
    objective: Objective
    known: KnownModel
    world_size: int
    row_tokens: int
    rows: int | None
    """Per step and rank; None if the data is not here."""

    @property
    def mode(self) -> str:
        """The sharing mode of the configuration."""
        return self.config.data.sharing

    def memory(self, model: ModelConfig) -> dict[str, Any]:
        """Memory of every stage, with the recomputation of `model`."""
        assert self.known.vocab_size is not None, "known before memory is"
        return _memory(
            replace(self.config, model=model),
            self.objective,
            self.known,
            self.world_size,
            self.row_tokens,
            self.rows,
        )

    def job(self, machine: Hardware | None) -> Job | None:
        """What the formulas of time need; None without a named GPU, and with adapters."""
        if machine is None or machine.gpu is None or self.known.lora is not None:
            return None
        assert self.known.vocab_size is not None, "known before time is"
        return Job(
            gpu=machine.gpu,
            mfu=machine.mfu,
            model=self.config.model,
            sizes=self.known.sizes,
            vocab_size=self.known.vocab_size,
            world_size=self.world_size,
            has_reference=self.objective.reference == "model",
        )


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
    dataset = _dataset(config, missing)
    model = _known_model(config.model, dataset, missing)
    if model is not None:
        parallel.check_model(config.model, model.sizes)
        model = _with_adapters(config, model, missing)
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
    rows, row_tokens = None, _row_bound(config)
    if dataset is not None:
        plan["data"] = data_plan(config, planned_sampler(config, objective, dataset, ranks), model)
        rows = plan["data"]["rows_per_rank"]
        row_tokens = row_tokens or plan["data"]["longest_row"]
        plan["verdict"] = sharing_advice(config.data.sharing, plan["data"]["sharing"])
        plan["pipeline"] = {"rows_per_rank": rows, "bubble": pipeline_bubble(parallel, rows)}
    if row_tokens is None:
        missing.append("data.row_capacity is not set: only the data tells the longest row")
    if model is not None and model.vocab_size is not None:
        plan["parameters"] = parameter_counts(
            model.sizes, model.vocab_size, config.model.kind, config.model.num_labels
        )
        plan["trained_parameters"] = sum(plan["parameters"].values())
        if model.lora is not None:
            plan["parameters"] |= adapter_counts(
                model.lora,
                model.sizes,
                model.vocab_size,
                config.model.kind,
                config.model.num_labels,
            )
            plan["trained_parameters"] = plan["parameters"].pop("trained")
        if row_tokens is not None:
            run = PlannedRun(config, objective, model, world_size, row_tokens, rows)
            plan["memory"] = run.memory(config.model)
            _judge(plan, run, machine)
    if machine is not None and machine.gpu is not None and plan["time"] is None:
        if config.lora is None:
            missing.append("time: it needs the model's sizes and the data set")
        else:
            missing.append("time: it is known of the training of all weights only, not of adapters")
    if plan["data"] is not None:
        bubble = plan["pipeline"]["bubble"]
        plan["advice"] += [*batch_advice(config, plan["data"], bubble, ranks)]
        plan["advice"] += fill_advice(config, plan["data"])
    return plan


def _judge(plan: dict[str, Any], run: PlannedRun, machine: Hardware | None) -> None:
    """Add to `plan` whether the run fits, how long it takes, and advice on both."""
    job, data, parallel = run.job(machine), plan["data"], run.config.parallel
    mode, ranks = run.mode, plan["data_parallel_size"]
    if job is not None and data is not None:
        plan["time"] = run_time(job, parallel, data, mode, ranks)
    time, model = plan["time"], run.config.model
    if machine is not None:
        plan["fit"] = fit(machine, plan["memory"])
        if model.recompute_granularity is not None:
            without = with_recomputation(model, None)
            needed = fit(machine, run.memory(without))["needed_gib"]
            saved = None
            if job is not None and time is not None:
                faster = run_time(replace(job, model=without), parallel, data, mode, ranks)
                saved = 1 - faster["seconds_per_step"] / time["seconds_per_step"]
            plan["advice"] += recompute_advice(needed, machine.usable_gib, saved)
    if run.objective.reference == "model" and run.known.lora is None:
        gib = max(stage["reference"] for stage in plan["memory"]["stages"]) / GIB
        share = None if time is None else time["seconds"]["reference"] / time["seconds_per_step"]
        plan["advice"] += reference_advice(run.config, gib, share)


def _row_bound(config: Config) -> int | None:
    """Tokens that no row or padded micro batch exceeds, if the configuration gives a bound."""
    data = config.data
    if data.row_capacity is None:
        return None
    return data.row_capacity * (data.micro_batch_size or 1)


def _dataset(config: Config, missing: list[str]) -> PreferenceDataset | None:
    prefixes = [item.prefix for item in config.data.train_sets]
    absent = [prefix for prefix in prefixes if not Path(f"{prefix}.json").exists()]
    if not absent:
        datasets = [PreferenceDataset(prefix) for prefix in prefixes]
        for dataset in datasets:
            verify_tokens(dataset)
        return own_responses(join_datasets(datasets))
    missing.append(
        f"data.train = {', '.join(absent)} is not on this machine: tokens, rows, what sharing saves"
    )
    return None


def _known_model(
    config: ModelConfig, dataset: PreferenceDataset | None, missing: list[str]
) -> KnownModel | None:
    """The sizes of the model; None if they are not on this machine."""
    folder = _config_folder(config)
    if folder is not None:
        model = HFModel.read(folder)
        return KnownModel(model.sizes, model.vocab_size)
    sizes = config.sizes()
    if sizes is None:
        source = f"model.hf = {config.hf}"
        if config.hf is None:
            source = f"model.checkpoint = {config.checkpoint}"
        missing.append(
            f"{source} has no config.json on this machine: parameters, memory, operations; fetch "
            "that one file, or give the sizes (model.num_layers, …)"
        )
        return None
    if dataset is None:
        missing.append("the vocabulary's size comes from data.train: parameters, memory")
        return KnownModel(sizes, None)
    return KnownModel(sizes, dataset.vocab_size)


def _with_adapters(config: Config, model: KnownModel, missing: list[str]) -> KnownModel | None:
    """The model with the adapters of the lora section; None if they come from an adapter that is
    not on this machine."""
    lora = config.lora
    if lora is None:
        return model
    if lora.adapter is not None and not Path(lora.adapter).exists():
        missing.append(
            f"lora.adapter = {lora.adapter} is not on this machine: parameters, memory, "
            "operations; leave it out and give lora.r, lora.target_modules, …"
        )
        return None
    # imported only in this case, because it loads Megatron-Core
    from megatron_prefix.checkpoint import StartingModel

    folder = _config_folder(config.model)
    source = None if folder is None else HFModel.read(folder)
    resolved, _ = StartingModel.resolve_lora(lora, model.sizes, config.model.kind, source)
    return replace(model, lora=resolved)


def _config_folder(model: ModelConfig) -> Path | None:
    """The folder of config.json, if it is on this machine; nothing is fetched."""
    if model.hf is not None:  # a directory, else an id OWNER/NAME in the Hub's cache
        if (Path(model.hf) / "config.json").is_file():
            return Path(model.hf)
        if model.hf.count("/") != 1 or model.hf.startswith((".", "/", "~")):
            return None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.hf, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    if model.checkpoint is not None and Path(model.checkpoint).exists():
        # imported only in this case, because it loads Megatron-Core
        from megatron_prefix.checkpoint import hf_folder

        return hf_folder(model.checkpoint)
    return None


def _memory(
    config: Config,
    objective: Objective,
    known: KnownModel,
    world_size: int,
    row_tokens: int,
    rows: int | None,
) -> dict[str, Any]:
    """Every stage's memory by component, and the stage that has most; `host_gradients`, with
    `train.shadow_steps`, is on the host and not part of the total."""
    assert known.vocab_size is not None, "known before memory is"
    model = config.model, known.sizes, config.parallel
    shared = {"vocab_size": known.vocab_size, "world_size": world_size}
    of_rank: Callable[..., RankMemory] = rank_memory
    of_host: Callable[..., int] = host_gradients
    if known.lora is not None:
        of_rank = partial(adapted_memory, lora=known.lora)
        of_host = partial(adapted_host_gradients, lora=known.lora)
    stages = [
        of_rank(
            *model,
            **shared,
            row_tokens=row_tokens,
            stage=stage,
            has_reference=objective.reference == "model",
            rows=rows,
        )
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    described = [{**asdict(stage), "total": stage.total} for stage in stages]
    if config.train.shadow_steps:
        for stage, description in enumerate(described):
            description["host_gradients"] = of_host(*model, **shared, stage=stage)
    return {
        "row_tokens": row_tokens,
        "fullest_stage": max(range(len(stages)), key=lambda i: stages[i].total),
        "stages": described,
    }
