"""The data sets and samplers of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.data.steps import TARGETS, CostModel, Sampler
from megatron_prefix.data.steps.compositions import (
    Composition,
    InOrder,
    StepSettings,
    with_comparisons,
)
from megatron_prefix.data.steps.packed import PackedSteps, check_rows
from megatron_prefix.data.store import PreferenceDataset, join_datasets
from megatron_prefix.data.store.roles import mismatched_responses, own_responses
from megatron_prefix.data.store.verify import verify_checksums
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import Objective
from megatron_prefix.text import counted
from megatron_prefix.train.data_checks import run_sharing

if TYPE_CHECKING:
    from megatron_prefix.distributed import World

EVALUATION_GROUPS = 64
"""Groups evaluated at a time if the configuration counts steps in rows."""


class RowCosts(Protocol):
    """What is known of a model's work, of which ranks get similar shares."""

    def cost_model(self, dataset: PreferenceDataset, kind: str, is_trained: bool) -> CostModel:
        """The costs of rows of a data set, its pictures too, under `model.kind`; `is_trained` says
        whether the rows are trained on, or only scored."""


def open_on_nodes(
    prefix: str, setting: str, world: World, plan: PackedSteps | None = None
) -> PreferenceDataset:
    """Open a data set on every process. The main process compares all bytes with the checksums,
    unless `pack` did so for `plan`; the first process of every node checks the columns. Collective.

    Raises InputError if the data set is damaged, or differs between nodes.
    """

    def compare_bytes() -> None:
        dataset = PreferenceDataset(prefix, check=False)
        if plan is None or not plan.is_of_these_files(dataset):
            verify_checksums(dataset)

    world.beat(f"checking {setting}")
    world.once(partial(named, setting, compare_bytes))
    fingerprints = world.once_per_node(
        partial(named, setting, lambda: PreferenceDataset(prefix).fingerprint)
    )
    dataset = PreferenceDataset(prefix, check=False)
    if {*fingerprints, dataset.fingerprint} != {dataset.fingerprint}:
        names = ", ".join(sorted({text[:16] for text in fingerprints}))
        raise InputError(
            f"{setting}: the nodes have different data sets at {prefix} (fingerprints {names}): "
            "copy one to all, or name a path that all nodes share"
        )
    return dataset


def named(setting: str, action: Callable[[], Any]) -> Any:
    """The result of `action`, whose InputError then names the setting."""
    try:
        return action()
    except InputError as error:
        raise InputError(f"{setting}: {error}") from None


def open_verified(
    prefix: str,
    setting: str,
    world: World,
    plan: PackedSteps | None = None,
    *,
    needs_pairs: bool = True,
) -> PreferenceDataset:
    """Open the data set that `setting` names; see `open_on_nodes`.

    Raises InputError if it is damaged, or has nothing to compare although the objective
    `needs_pairs`.
    """
    dataset = open_on_nodes(prefix, setting, world, plan)
    if needs_pairs and not dataset.manifest["counts"]["pairs"]:
        raise InputError(
            f"{setting}: {prefix} has {counted(len(dataset.response_lengths), 'response')} and no "
            "pair (it was built from unpaired records), but the loss compares pairs: build from "
            "records with chosen and rejected responses"
        )
    return dataset


def open_training_set(
    config: Config, world: World, plan: PackedSteps | None = None, *, needs_pairs: bool = True
) -> PreferenceDataset:
    """The data set of `data.train`, or those that it lists, joined, without mismatches. Rows of
    `plan` must hold it."""
    sets = config.data.train_sets
    names = [f"data.train[{i}]" for i in range(len(sets))] if len(sets) > 1 else ["data.train"]
    parts = [
        open_verified(item.prefix, name, world, plan, needs_pairs=needs_pairs)
        for item, name in zip(sets, names, strict=True)
    ]
    dataset = own_responses(join_datasets(parts))
    # A plan of other data is refused later, with both values.
    if plan is not None and plan.manifest["data"]["fingerprint"] == dataset.fingerprint:
        world.once_per_node(partial(named, "data.plan", partial(check_rows, plan, dataset)))
    return dataset


def open_valid_sets(
    config: Config, world: World, *, needs_pairs: bool = True
) -> dict[str, PreferenceDataset]:
    """The held-out data sets by name, without mismatches; the name of a single one is ""."""
    return {
        name: own_responses(
            open_verified(prefix, valid_setting(name), world, needs_pairs=needs_pairs)
        )
        for name, prefix in config.data.valid_sets.items()
    }


def valid_setting(name: str) -> str:
    """A held-out data set in messages."""
    return f"data.valid.{name}" if name else "data.valid"


def open_plan(config: Config, world: World) -> PackedSteps | None:
    """The plan that `data.plan` names. The main process checks its checksums, the first process of
    every node that its steps pack their groups."""
    path = config.data.plan
    if path is None:
        return None
    setting = "data.plan"
    world.once(partial(named, setting, lambda: PackedSteps(path, check=False).verify()))
    world.once_per_node(partial(named, setting, lambda: PackedSteps(path).path))
    return PackedSteps(path, check=False)


def plan_settings(config: Config, objective: Objective) -> StepSettings:
    """The settings that decide which groups share a step and a row."""
    data = config.data
    return StepSettings(
        seed=data.seed,
        sharing=run_sharing(objective, data.sharing),
        row_capacity=data.row_capacity,
        global_batch_size=data.global_batch_size,
        rows_per_step=data.rows_per_step,
        sort_by_length=data.sort_by_length,
        packing_method=data.packing_method,
        oversized=data.oversized,
        epochs=config.train.epochs,
        weights=data.weights,
        set_epochs=data.set_epochs,
    )


def training_sampler(
    config: Config,
    objective: Objective,
    dataset: PreferenceDataset,
    world: World | None = None,
    plan: PackedSteps | None = None,
    costs: RowCosts | None = None,
) -> Sampler:
    """The training sampler of the data section; it follows `plan` if there is one.

    `objective` is that of `config.loss`. `costs` give the work per row, which is balanced over the
    ranks; without them it follows from the sizes in `config`, if they are given there. Raises
    InputError if the plan is for other data or settings.
    """
    settings = plan_settings(config, objective)
    selected = _selected(objective, dataset, "data.train")
    if plan is not None:
        plan.check(dataset, settings, config.train.steps)
        if selected is not dataset and settings.sharing in ("none", "pair"):
            raise InputError(
                f"data.plan with loss.comparisons: {objective.comparisons} and data.sharing: "
                f"{settings.sharing}: the plan has rows for all pairs: remove data.plan, or set "
                "data.sharing: tree"
            )
    composition = settings.composition(selected) if plan is None else plan
    return _sampler(config, objective, selected, composition, world, costs, is_trained=True)


def evaluation_sampler(
    config: Config,
    objective: Objective,
    dataset: PreferenceDataset,
    world: World | None,
    costs: RowCosts | None,
    *,
    is_scoring: bool = False,
    sharing: str | None = None,
) -> Sampler:
    """All groups once, in the data set's order, in the configuration's rows, or under another
    `sharing`. `is_scoring` takes every response, also if `loss.comparisons` leaves out its pairs.
    """
    if not is_scoring:
        dataset = _selected(objective, dataset, "data.valid")
    composition = InOrder(len(dataset), evaluation_block(config))
    return _sampler(config, objective, dataset, composition, world, costs, sharing)


def mismatch_sampler(
    config: Config,
    objective: Objective,
    sampler: Sampler,
    setting: str,
    world: World | None,
    costs: RowCosts | None,
) -> Sampler | None:
    """The mismatches of the groups of `sampler`'s steps, each after its prompt in a sequence of
    its own; None if the objective does not need them.

    Raises InputError if the data set `setting` has none.
    """
    if not objective.needs_mismatches:
        return None
    view = mismatched_responses(sampler.dataset)
    if view is None:
        raise InputError(
            f"{setting} = {sampler.dataset.prefix}: loss.loss_type: {objective.name} measures the "
            "distance to the reference on mismatched responses, and the data set has none: build "
            "it again with megatron-prefix build --kto, or take apo_zero_unpaired or bco"
        )
    groups = _Groups(sampler.composition)
    return _sampler(config, objective, view, groups, world, costs, sharing="response")


def joint_sampler(
    config: Config,
    objective: Objective,
    sampler: Sampler,
    world: World | None,
    costs: RowCosts | None,
) -> Sampler | None:
    """The groups of `sampler`'s steps with own responses and mismatches in one tree, for the
    reference (joint_reference.py). None if the objective needs no mismatches, no model is the
    reference, or `sampler` shares no prompts: then both have rows of their own.

    A tree that fits a row without its mismatch may not fit with it, so it may always be cut.
    """
    is_model = objective.reference == "model"
    if not objective.needs_mismatches or not is_model or sampler.sharing != "tree":
        return None
    groups, stored = _Groups(sampler.composition), sampler.dataset.stored
    return _sampler(config, objective, stored, groups, world, costs, "tree", oversized="split")


@dataclass(frozen=True)
class _Groups:
    """The groups of the steps of another composition, without its rows."""

    composition: Composition

    def groups(self, step: int) -> np.ndarray:
        return self.composition.groups(step)

    def num_steps(self, epochs: int) -> int:
        return self.composition.num_steps(epochs)


def evaluation_block(config: Config) -> int:
    """Groups that are evaluated at a time, and that an objective of the whole step sees at once."""
    return config.data.global_batch_size or EVALUATION_GROUPS


def _selected(objective: Objective, dataset: PreferenceDataset, setting: str) -> PreferenceDataset:
    """The data set with the pairs that enter the loss."""
    try:
        return with_comparisons(dataset, objective.comparisons)
    except InputError as error:
        raise InputError(f"{setting}: {error}") from None


def _sampler(
    config: Config,
    objective: Objective,
    dataset: PreferenceDataset,
    composition: Composition,
    world: World | None,
    costs: RowCosts | None,
    sharing: str | None = None,
    *,
    oversized: str | None = None,
    is_trained: bool = False,
) -> Sampler:
    data, kind = config.data, config.model.kind
    cost = None
    if costs is not None:
        cost = costs.cost_model(dataset, kind, is_trained)
    elif (sizes := config.model.sizes()) is not None:
        cost = CostModel.of_model(sizes, dataset.vocab_size, kind)
    sampler = Sampler(
        dataset=dataset,
        composition=composition,
        sharing=sharing or run_sharing(objective, data.sharing),
        weighting=objective.weighting,
        row_capacity=data.row_capacity,
        micro_batch_size=data.micro_batch_size,
        targets=TARGETS[kind],
        packing_method=data.packing_method,
        oversized=oversized or data.oversized,
        pads_to_capacity=data.pad_rows == "capacity",
        with_attributes=objective.num_labels > 1,
        cost=cost,
        **(world.sampler_layout if world is not None else {}),
    )
    row_multiple = sampler.row_multiple * config.model.token_multiple
    sampler = replace(sampler, row_multiple=row_multiple)
    if objective.parts.heads and (group := sampler.first_divided()) is not None:
        setting = "data.row_capacity" if data.row_capacity else "data.micro_batch_size"
        raise InputError(
            f"loss.ld_alpha = {objective.ld_alpha} with data.oversized: split: both sides of a "
            f"pair must lie in one row, and {dataset.place(group)} is cut: raise {setting}, or "
            "remove loss.ld_alpha"
        )
    return sampler
