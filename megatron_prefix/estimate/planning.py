"""What a configuration asks of a cluster, before there is one: `megatron-prefix plan`.

1. Sizes: from the configuration, or from `config.json` of a model that is on this machine.
2. Memory of a rank and pipeline bubble, by the formulas of memory.py.
3. Where the data set is on this machine: its first steps, under every sharing mode, in tokens and
   in operations (flops.py), and so whether sharing pays.

What cannot be known here is listed under `missing`, with what would tell.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.checkpoint import save_load as checkpoint
from megatron_prefix.checkpoint.starting_model import HF_FOLDER
from megatron_prefix.config.rules import layout_faults, world_faults
from megatron_prefix.config.schema import Config, ModelConfig
from megatron_prefix.data.steps.collate import TARGETS
from megatron_prefix.data.steps.rows import group_rows
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.steps.sharing import SHARING_MODES
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.estimate.flops import ForwardFlops, forward_flops
from megatron_prefix.estimate.memory import parameter_counts, pipeline_bubble, rank_memory
from megatron_prefix.model.hf.config import read_hf_config
from megatron_prefix.model.provider import with_sizes
from megatron_prefix.train.samplers import training_sampler

STEPS_READ = 8
"""First steps of the run whose rows are looked at."""
PAYS_BELOW = 0.95
"""Operations over those without sharing from which on it is said to pay."""


def plan_run(config: Config, world_size: int | None = None) -> dict[str, Any]:
    """Everything that `plan` says, ready for JSON. Raises InputError where the layout divides
    neither the model nor `world_size`, which is by default the least that the layout takes."""
    parallel = config.parallel
    stages = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    if world_size is None:
        world_size = stages * math.lcm(context, parallel.expert_model_parallel_size)
    if faults := list(world_faults(parallel, world_size)):
        raise InputError(f"--world-size: {faults[0]}")
    missing: list[str] = []
    dataset = _dataset(config, missing)
    model, vocab_size = _sizes(config.model, dataset, missing)
    if model is not None and (faults := list(layout_faults(model, parallel))):
        raise InputError("; ".join(faults))
    ranks = world_size // (stages * context)
    found: dict[str, Any] = {
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
        sampler = _sampler(config, dataset, ranks)
        found["data"] = _data(config, sampler, model, vocab_size)
        rows = found["data"]["rows_per_rank"]
        row_tokens = row_tokens or found["data"]["longest_row"]
        found["verdict"] = verdict(config.data.sharing, found["data"]["sharing"])
        found["pipeline"] = {"rows_per_rank": rows, "bubble": pipeline_bubble(parallel, rows)}
    if row_tokens is None:
        missing.append("data.row_capacity is not set: the longest row is known from the data only")
    if model is not None and vocab_size is not None:
        found["parameters"] = parameter_counts(model, vocab_size)
        if row_tokens is not None:
            found["memory"] = _memory(config, model, vocab_size, world_size, row_tokens, rows)
    return found


def _row_bound(config: Config) -> int | None:
    """Tokens that no row or padded micro batch exceeds, if the configuration says so."""
    data = config.data
    if data.row_capacity is None:
        return None
    return data.row_capacity * (data.micro_batch_size or 1)


def _dataset(config: Config, missing: list[str]) -> PreferenceDataset | None:
    prefix = config.data.train
    if Path(f"{prefix}.json").exists():
        return PreferenceDataset(prefix)
    missing.append(
        f"data.train = {prefix} is not on this machine: tokens, rows, what sharing saves"
    )
    return None


def _sizes(
    model: ModelConfig, dataset: PreferenceDataset | None, missing: list[str]
) -> tuple[ModelConfig | None, int | None]:
    """The model with its sizes, and its vocabulary's; None for what is not known here."""
    folder = _config_folder(model)
    if folder is not None:
        return with_sizes(model, read_hf_config(folder), f"{folder}/config.json")
    if model.num_layers is None:
        source = f"model.hf = {model.hf}" if model.hf else f"model.checkpoint = {model.checkpoint}"
        missing.append(
            f"{source} has no config.json on this machine: parameters, memory, operations; fetch "
            "that one file, or give the sizes (model.num_layers, …)"
        )
        return None, None
    if dataset is None:
        missing.append("the vocabulary's size comes from data.train: parameters, memory")
        return model, None
    return model, dataset.vocab_size


def _config_folder(model: ModelConfig) -> Path | None:
    """Where config.json lies, if on this machine; nothing is fetched."""
    if model.hf is not None:
        if (Path(model.hf) / "config.json").is_file():
            return Path(model.hf)
        if model.hf.count("/") != 1 or model.hf.startswith((".", "/", "~")):
            return None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.hf, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    if model.checkpoint is not None and Path(model.checkpoint).exists():
        folder = checkpoint.resolve_checkpoint(model.checkpoint) / HF_FOLDER
        return folder if (folder / "config.json").is_file() else None
    return None


def _sampler(config: Config, dataset: PreferenceDataset, ranks: int) -> Sampler:
    """The run's sampler, as World.rows lays out its ranks."""
    parallel = config.parallel
    return replace(
        training_sampler(config, dataset),
        num_ranks=ranks,
        row_multiple=parallel.row_multiple,
        count_multiple=parallel.count_multiple,
    )


def _data(
    config: Config, sampler: Sampler, model: ModelConfig | None, vocab_size: int | None
) -> dict[str, Any]:
    """Means a step over the run's first steps; rows are those of the step with most, and rows'
    tokens include padding."""
    steps = min(STEPS_READ, sampler.composition.num_steps(1), config.train.steps or STEPS_READ)
    plans = [sampler.step(step) for step in range(steps)]
    lengths = [
        len(row.tokens)
        for plan in plans
        for rank in range(sampler.num_ranks)
        for row in sampler.micro_batches(plan, rank)
    ]
    groups = np.concatenate([plan.groups for plan in plans])
    return {
        "steps_read": steps,
        "groups_per_step": len(groups) / steps,
        "pairs_per_step": sum(plan.num_pairs for plan in plans) / steps,
        "rows_per_rank": max(len(plan.rows[0]) for plan in plans),
        "longest_row": max(lengths),
        "tokens_per_row": sum(lengths) / len(lengths),
        "sharing": {
            mode: _cost(config, sampler.dataset, groups, mode, steps, model, vocab_size)
            for mode in SHARING_MODES
        },
    }


def _cost(
    config: Config,
    dataset: PreferenceDataset,
    groups: np.ndarray,
    mode: str,
    steps: int,
    model: ModelConfig | None,
    vocab_size: int | None,
) -> dict[str, float | None]:
    """Tokens and operations of forward passes, a step, without padding."""
    tokens, flops = 0, ForwardFlops()
    for group in groups:
        for row in group_rows(dataset, int(group), mode, TARGETS[config.model.kind]):
            tokens += row.num_tokens
            if model is not None:
                flops += forward_flops(model, vocab_size, row)
    known = flops.total / steps if model is not None else None
    return {"tokens": tokens / steps, "forward_flops": known}


def verdict(mode: str, sharing: dict[str, dict[str, float | None]]) -> str:
    """One sentence on whether sharing pays on this data; in tokens where operations are not
    known."""
    unit = "tokens" if sharing["none"]["forward_flops"] is None else "forward_flops"
    word = "tokens" if unit == "tokens" else "operations"
    chosen = "tree" if mode == "none" else mode
    ratio = sharing[chosen][unit] / sharing["none"][unit]
    size = f"data.sharing: {chosen} takes {ratio:.2f} of the {word} of none"
    if ratio >= PAYS_BELOW:
        return f"sharing hardly pays on this data: {size}; packing rows still does"
    if mode == "none":
        return f"sharing would pay on this data, and is off: {size}"
    return f"sharing pays on this data: {size}"


def _memory(
    config: Config,
    model: ModelConfig,
    vocab_size: int,
    world_size: int,
    row_tokens: int,
    rows: int | None,
) -> dict[str, Any]:
    """Every stage's memory by component, and which stage has most."""
    stages = [
        rank_memory(
            model,
            config.parallel,
            vocab_size=vocab_size,
            world_size=world_size,
            row_tokens=row_tokens,
            stage=stage,
            has_reference=config.loss.reference == "model",
            rows=rows,
        )
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    return {
        "row_tokens": row_tokens,
        "fullest_stage": max(range(len(stages)), key=lambda i: stages[i].total),
        "stages": [{**asdict(stage), "total": stage.total} for stage in stages],
    }
