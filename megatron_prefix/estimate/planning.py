"""What a configuration asks of a cluster, before there is one: `megatron-prefix plan`.

1. Sizes: from the configuration, or from `config.json` of a model that is on this machine.
2. Memory of a rank and pipeline bubble, by the formulas of memory.py.
3. If the data set is on this machine: its first steps, under every sharing mode, in tokens and
   in operations (flops.py), and so whether sharing pays.

What cannot be known is listed under `missing`, with its remedy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.config import Config, ModelConfig, ModelSizes
from megatron_prefix.data.steps import SHARING_MODES, Sampler
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.data.store.roles import own_responses
from megatron_prefix.data.store.verify import verify_tokens
from megatron_prefix.distributed import world_faults
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.flops import ForwardFlops, forward_flops
from megatron_prefix.estimate.memory import (
    host_gradients,
    parameter_counts,
    pipeline_bubble,
    rank_memory,
)
from megatron_prefix.model.hf import HFModel
from megatron_prefix.objectives import Objective, check
from megatron_prefix.train import run_sharing, training_sampler

STEPS_READ = 8
"""First steps of the run whose rows are read."""
PAYS_BELOW = 0.95
"""Sharing pays if its operations over those without sharing are below this."""


@dataclass(frozen=True)
class KnownModel:
    """What is known of the model on this machine: its vocabulary may come from absent data."""

    sizes: ModelSizes
    vocab_size: int | None


def plan_run(config: Config, world_size: int | None = None) -> dict[str, Any]:
    """Everything that `plan` prints, ready for JSON; `world_size` is by default the smallest number
    of processes that the layout takes. Raises InputError if the layout divides neither the model
    nor `world_size`."""
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    if config.lora is not None:
        raise InputError(
            "plan counts the training of all weights, not yet of adapters: remove the lora section "
            "for an upper bound"
        )
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
    ranks = world_size // (stages * context)
    plan: dict[str, Any] = {
        "world_size": world_size,
        "data_parallel_size": ranks,
        "parameters": None,
        "memory": None,
        "data": None,
        "pipeline": None,
        "verdict": None,
        "missing": missing,
    }
    rows, row_tokens = None, _row_bound(config)
    if dataset is not None:
        plan["data"] = _data(config, _sampler(config, objective, dataset, ranks), model)
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
        if row_tokens is not None:
            plan["memory"] = _memory(
                config, objective, model.sizes, model.vocab_size, world_size, row_tokens, rows
            )
    return plan


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


def _sampler(
    config: Config, objective: Objective, dataset: PreferenceDataset, ranks: int
) -> Sampler:
    """The run's sampler, for `ranks` data-parallel ranks."""
    parallel = config.parallel
    return replace(
        training_sampler(config, objective, dataset),
        num_ranks=ranks,
        row_multiple=parallel.row_multiple,
        count_multiple=parallel.count_multiple,
    )


def _data(config: Config, sampler: Sampler, model: KnownModel | None) -> dict[str, Any]:
    """Means per step over the run's first steps; `rows_per_rank` is the largest of them, and
    the tokens of rows include padding."""
    steps = min(STEPS_READ, sampler.composition.num_steps(1), config.train.steps or STEPS_READ)
    plans = [sampler.step(step) for step in range(steps)]
    lengths = [
        len(row.tokens)
        for plan in plans
        for rank in range(sampler.num_ranks)
        for row in sampler.micro_batches(plan, rank)
    ]
    # the same groups under every sharing mode, so that the modes can be compared
    groups = np.concatenate([plan.groups for plan in plans])
    split = {}
    if sampler.oversized == "split":
        split["repeated_tokens_per_step"] = sum(p.repeated_tokens for p in plans) / steps
        split["divided_steps"] = sum(plan.is_divided for plan in plans) / steps
    return {
        "steps_read": steps,
        "groups_per_step": len(groups) / steps,
        "pairs_per_step": sum(plan.num_pairs for plan in plans) / steps,
        "rows_per_rank": max(len(plan.rows[0]) for plan in plans),
        "longest_row": max(lengths),
        "tokens_per_row": sum(lengths) / len(lengths),
        "sharing": {
            mode: _cost(config.model.kind, sampler, groups, laid_out, steps, model)
            for mode, laid_out in _modes(config).items()
        },
        **split,
    }


def _modes(config: Config) -> dict[str, str]:
    """The sharing modes that the run may have, each with the one in which its rows are laid out."""
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    modes = [x for x in SHARING_MODES if not (objective.needs_sets and x == "pair")]
    return {mode: run_sharing(objective, mode) for mode in modes}


def _cost(
    kind: str,
    sampler: Sampler,
    groups: np.ndarray,
    mode: str,
    steps: int,
    model: KnownModel | None,
) -> dict[str, float | None]:
    """Tokens and operations of the forward passes per step, without padding."""
    tokens, flops = 0, ForwardFlops()
    for group in groups:
        for row in sampler.rows_of_group(int(group), mode):
            tokens += row.num_tokens
            if model is not None:
                vocab_size = model.vocab_size or sampler.dataset.vocab_size
                flops += forward_flops(model.sizes, vocab_size, row, kind)
    known = flops.total / steps if model is not None else None
    return {"tokens": tokens / steps, "forward_flops": known}


def sharing_advice(mode: str, sharing: dict[str, dict[str, float | None]]) -> str:
    """One sentence on whether sharing pays on this data: in operations, or in tokens if the
    operations are not known."""
    chosen = "tree" if mode == "none" else mode
    with_sharing, without = sharing[chosen]["forward_flops"], sharing["none"]["forward_flops"]
    word = "operations"
    if with_sharing is None or without is None:
        with_sharing, without = sharing[chosen]["tokens"], sharing["none"]["tokens"]
        word = "tokens"
    assert with_sharing is not None and without is not None, "tokens are always known"
    ratio = with_sharing / without
    size = f"data.sharing: {chosen} takes {ratio:.2f} of the {word} of none"
    if ratio >= PAYS_BELOW:
        return f"sharing hardly pays on this data: {size}; packing rows still does"
    if mode == "none":
        return f"sharing would pay on this data, and is off: {size}"
    return f"sharing pays on this data: {size}"


def _memory(
    config: Config,
    objective: Objective,
    sizes: ModelSizes,
    vocab_size: int,
    world_size: int,
    row_tokens: int,
    rows: int | None,
) -> dict[str, Any]:
    """Every stage's memory by component, and the stage that has most; `host_gradients`, with
    `train.shadow_steps`, is on the host and not part of the total."""
    stages = [
        rank_memory(
            config.model,
            sizes,
            config.parallel,
            vocab_size=vocab_size,
            world_size=world_size,
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
            description["host_gradients"] = host_gradients(
                config.model,
                sizes,
                config.parallel,
                vocab_size=vocab_size,
                world_size=world_size,
                stage=stage,
            )
    return {
        "row_tokens": row_tokens,
        "fullest_stage": max(range(len(stages)), key=lambda i: stages[i].total),
        "stages": described,
    }
