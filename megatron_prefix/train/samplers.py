"""Data sets and samplers that a configuration asks for."""

from __future__ import annotations

import numpy as np

from megatron_prefix.config.schema import Config, LossConfig, ModelConfig
from megatron_prefix.data.steps.collate import TARGETS
from megatron_prefix.data.steps.compositions.batches import Composition, InOrder
from megatron_prefix.data.steps.compositions.settings import StepSettings
from megatron_prefix.data.steps.cost import CostModel
from megatron_prefix.data.steps.packed.reading import PackedSteps
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.verify.checks import verify_checksums
from megatron_prefix.distributed.world import World
from megatron_prefix.errors import InputError

EVALUATION_GROUPS = 64
"""Groups scored at a time where the configuration counts steps in rows."""


def open_verified(
    prefix: str, setting: str, world: World, plan: PackedSteps | None = None
) -> PreferenceDataset:
    """Open the data set that `setting` names; the main process checks every checksum.

    With a `plan` for which `pack` read the very same files, they are not read again. Raises
    InputError where it is damaged, or holds nothing to compare.
    """

    def verify() -> None:
        try:
            dataset = PreferenceDataset(prefix)
            if plan is None or not plan.is_of_these_files(dataset):
                verify_checksums(dataset)
        except InputError as error:
            raise InputError(f"{setting}: {error}") from None

    world.beat(f"checking {setting}")
    world.once(verify)
    dataset = PreferenceDataset(prefix)
    if not dataset.manifest["counts"]["pairs"]:
        raise InputError(
            f"{setting}: {prefix} holds {len(dataset.response_lengths)} responses and no pair (it "
            "was built from unpaired records), and the loss compares pairs: build from records "
            "with chosen and rejected responses"
        )
    return dataset


def open_plan(config: Config, world: World) -> PackedSteps | None:
    """The plan that `data.plan` names; the main process checks its checksums."""
    path = config.data.plan
    if path is None:
        return None

    def verify() -> None:
        try:
            PackedSteps(path).verify()
        except InputError as error:
            raise InputError(f"data.plan: {error}") from None

    world.once(verify)
    return PackedSteps(path)


def check_margins(loss: LossConfig, dataset: PreferenceDataset, setting: str) -> None:
    """Refuse a data set some of whose pairs have no margin, where the loss needs it."""
    if not loss.margin:
        return
    missing = np.flatnonzero(np.isnan(dataset.pair_margins))
    if len(missing):
        group = int(np.searchsorted(dataset.group_pairs, missing[0], side="right")) - 1
        raise InputError(
            f"{setting}: {len(missing)} of the {len(dataset.pair_margins)} pairs in "
            f"{dataset.prefix} have no margin (first in group {group}, record "
            f"{int(dataset.group_records[group])}), and loss.margin: true needs one of each: give "
            "every record a margin and build again, or leave loss.margin out"
        )


def plan_settings(config: Config) -> StepSettings:
    """What of a configuration decides which groups share a step and a row."""
    data = config.data
    return StepSettings(
        seed=data.seed,
        sharing=data.sharing,
        row_capacity=data.row_capacity,
        global_batch_size=data.global_batch_size,
        rows_per_step=data.rows_per_step,
        sort_by_length=data.sort_by_length,
        packing_method=data.packing_method,
        epochs=config.train.epochs,
    )


def training_sampler(
    config: Config,
    dataset: PreferenceDataset,
    world: World | None = None,
    plan: PackedSteps | None = None,
    sizes: ModelConfig | None = None,
) -> Sampler:
    """The training sampler that the data section describes, on `plan` where there is one.

    `sizes` are the model's where `config` only names it; ranks get alike of its work. Raises
    InputError where the plan is of other data or settings.
    """
    settings = plan_settings(config)
    if plan is not None:
        plan.check(dataset, settings, config.train.steps)
    composition = settings.composition(dataset) if plan is None else plan
    return _sampler(config, dataset, composition, world, sizes)


def evaluation_sampler(
    config: Config,
    dataset: PreferenceDataset,
    world: World | None = None,
    sizes: ModelConfig | None = None,
) -> Sampler:
    """All groups once, in the data set's order, in the configuration's rows."""
    batch_size = config.data.global_batch_size or EVALUATION_GROUPS
    return _sampler(config, dataset, InOrder(len(dataset), batch_size), world, sizes)


def _sampler(
    config: Config,
    dataset: PreferenceDataset,
    composition: Composition,
    world: World | None,
    sizes: ModelConfig | None,
) -> Sampler:
    data, model = config.data, sizes or config.model
    has_sizes = model.num_layers is not None
    return Sampler(
        dataset=dataset,
        composition=composition,
        sharing=data.sharing,
        weighting=config.loss.weighting,
        row_capacity=data.row_capacity,
        micro_batch_size=data.micro_batch_size,
        targets=TARGETS[model.kind],
        packing_method=data.packing_method,
        cost=CostModel.of_model(model, dataset.vocab_size) if has_sizes else None,
        **(world.rows if world is not None else {}),
    )
