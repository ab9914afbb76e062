"""The data of a plan: the first steps under every sharing mode, and whether sharing pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_prefix.config import Config, ModelSizes
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.data.steps import SHARING_MODES, CostModel, Sampler, Step
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.estimate.adapters import adapter_flops, training_flops
from megatron_prefix.estimate.flops import ForwardFlops, forward_flops
from megatron_prefix.estimate.vision import KnownVision
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
    lora: LoraConfig | None = None
    """The lora section, resolved."""
    vision: KnownVision | None = None

    def cost_model(self, dataset: PreferenceDataset, kind: str, is_trained: bool) -> CostModel:
        """The costs of rows of the data set whose pictures `vision` knows."""
        costs, vision = CostModel.of_model(self.sizes, dataset.vocab_size, kind), self.vision
        if vision is None:
            return costs
        return costs.with_pictures(
            vision.pictures,
            freezes_tower=is_trained and not vision.trains_tower,
            freezes_projector=is_trained and not vision.trains_projector,
        )


def planned_sampler(
    config: Config,
    objective: Objective,
    dataset: PreferenceDataset,
    ranks: int,
    model: KnownModel | None = None,
) -> Sampler:
    """The run's sampler, for `ranks` data-parallel ranks; without a `model` rows cost what the
    sizes in `config` say."""
    parallel = config.parallel
    return replace(
        training_sampler(config, objective, dataset, costs=model),
        num_ranks=ranks,
        row_multiple=parallel.row_multiple * config.model.token_multiple,
        count_multiple=parallel.count_multiple,
    )


def data_plan(config: Config, sampler: Sampler, model: KnownModel | None) -> dict[str, Any]:
    """Means per step over the run's first steps; `rows_per_rank` is the largest of them, and
    the tokens of rows include padding."""
    steps = min(STEPS_READ, sampler.composition.num_steps(1), config.train.steps or STEPS_READ)
    plans = [sampler.step(step) for step in range(steps)]
    rows = [
        row
        for plan in plans
        for rank in range(sampler.num_ranks)
        for row in sampler.micro_batches(plan, rank)
    ]
    lengths = [len(row.tokens) for row in rows]
    # the same groups under every sharing mode, so that the modes can be compared
    groups = np.concatenate([plan.groups for plan in plans])
    split: dict[str, Any] = {}
    if sampler.oversized == "split":
        split["repeated_tokens_per_step"] = sum(p.repeated_tokens for p in plans) / steps
        split["divided_steps"] = sum(plan.is_divided for plan in plans) / steps
    if model is not None and model.vision is not None:
        split["kept_of_images"] = max(model.vision.kept(config.model, row) for row in rows)
    return {
        "steps_read": steps,
        "num_steps": config.train.steps or sampler.composition.num_steps(config.train.epochs or 1),
        "executed_tokens_per_step": sum(lengths) / steps,
        "groups_per_step": len(groups) / steps,
        "pairs_per_step": sum(plan.num_pairs for plan in plans) / steps,
        "rows_per_rank": max(len(plan.rows[0]) for plan in plans),
        "busy_ranks": mean_busy_ranks(plans),
        "longest_row": max(lengths),
        "tokens_per_row": sum(lengths) / len(lengths),
        "sharing": {
            mode: _cost(config, sampler, groups, laid_out, steps, model)
            for mode, laid_out in _modes(config).items()
        },
        **split,
    }


def mean_busy_ranks(plans: Sequence[Step]) -> float:
    """The work of all ranks over that of the busiest one, mean over steps; 4 ranks of the costs 6,
    6, 6 and 9: 3."""
    return sum(sum(plan.costs) / max(plan.costs) for plan in plans) / len(plans)


def _modes(config: Config) -> dict[str, str]:
    """The sharing modes that the run may have, each with the one in which its rows are laid out."""
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    modes = [x for x in SHARING_MODES if not (objective.needs_sets and x == "pair")]
    return {mode: run_sharing(objective, mode) for mode in modes}


def _cost(
    config: Config,
    sampler: Sampler,
    groups: np.ndarray,
    mode: str,
    steps: int,
    model: KnownModel | None,
) -> dict[str, Any]:
    """Tokens and operations of the forward passes per step, without padding; with adapters also
    the operations of training, and those of training all weights."""
    tokens, flops, kind = 0, ForwardFlops(), config.model.kind
    pieces = keys = 0
    for group in groups:
        for row in sampler.rows_of_group(int(group), mode):
            tokens += row.num_tokens
            # a piece per leaf, whose keys are the leaf's root path
            layout = row.layout
            ends = (layout.starts + layout.lengths)[layout.leaf_mask]
            pieces += len(ends)
            keys += int((layout.positions_of(ends - 1) + 1).sum())
            if model is not None:
                vocab_size = model.vocab_size or sampler.dataset.vocab_size
                pictures = () if model.vision is None else model.vision.pictures
                flops += forward_flops(model.sizes, vocab_size, row, kind, pictures)
    parts, training = None, {}
    if model is not None and model.lora is not None:
        objective = check(config.loss, kind, num_labels=config.model.num_labels)
        settings = kind, objective.reference == "model", model.vision
        training["full_training_flops"] = training_flops(flops, None, *settings) / steps
        flops = replace(flops, adapters=adapter_flops(model.lora, model.sizes, tokens))
        training["training_flops"] = training_flops(flops, model.lora, *settings) / steps
    if model is not None:
        parts = {name: value / steps for name, value in asdict(flops).items()}
    return {
        "tokens": tokens / steps,
        "pieces": pieces / steps,
        "gathered_keys": keys / steps,
        "forward_flops": sum(parts.values()) if parts else None,
        "forward_parts": parts,
        **training,
    }


def sharing_advice(mode: str, sharing: dict[str, dict[str, Any]]) -> str:
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
