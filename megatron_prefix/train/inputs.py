"""Data sets and samplers that a configuration asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.data.record_batches import group_batches
from megatron_prefix.data.sampler import RowBatches, Sampler, group_lengths
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.train.parallel import World

EVALUATION_GROUPS = 64
"""Groups scored at a time where the configuration counts steps in rows."""


def open_verified(prefix: str, setting: str, world: World) -> PreferenceDataset:
    """Open the data set that `setting` names; the main process checks every checksum.

    Raises InputError where it is damaged, or holds nothing to compare.
    """

    def verify() -> None:
        try:
            PreferenceDataset(prefix).verify_checksums()
        except InputError as error:
            raise InputError(f"{setting}: {error}") from None

    world.once(verify)
    dataset = PreferenceDataset(prefix)
    if not dataset.manifest["counts"]["pairs"]:
        raise InputError(
            f"{setting}: {prefix} holds {len(dataset.response_lengths)} responses and no pair (it "
            "was built from unpaired records), and the loss compares pairs: build from records "
            "with chosen and rejected responses"
        )
    return dataset


@dataclass(frozen=True)
class InOrder:
    """A composition that takes the data set's groups as they stand, `batch_size` a step."""

    num_groups: int
    batch_size: int

    def groups(self, step: int) -> np.ndarray:
        stop = min((step + 1) * self.batch_size, self.num_groups)
        return np.arange(step * self.batch_size, stop)

    def num_steps(self, epochs: int) -> int:
        return epochs * -(-self.num_groups // self.batch_size)


def training_sampler(
    config: Config, dataset: PreferenceDataset, world: World | None = None
) -> Sampler:
    """The training sampler that the data section describes."""
    data, train = config.data, config.train
    if data.global_batch_size:
        composition = group_batches(dataset, data.global_batch_size, data.seed, train.epochs)
    else:
        composition = RowBatches(
            group_lengths(dataset, data.sharing),
            data.row_capacity,
            data.rows_per_step,
            dataset.fingerprint,
            data.seed,
        )
    return Sampler(
        dataset=dataset,
        composition=composition,
        sharing=data.sharing,
        weighting=config.loss.weighting,
        row_capacity=data.row_capacity,
        micro_batch_size=data.micro_batch_size,
        **(world.rows if world is not None else {}),
    )


def evaluation_sampler(
    config: Config, dataset: PreferenceDataset, world: World | None = None
) -> Sampler:
    """All groups once, in the data set's order, in the configuration's rows."""
    data = config.data
    return Sampler(
        dataset=dataset,
        composition=InOrder(len(dataset), data.global_batch_size or EVALUATION_GROUPS),
        sharing=data.sharing,
        weighting=config.loss.weighting,
        row_capacity=data.row_capacity,
        micro_batch_size=data.micro_batch_size,
        **(world.rows if world is not None else {}),
    )
