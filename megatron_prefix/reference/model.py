"""References: the log-probabilities that a run's rewards are measured from.

A frozen copy of the initial policy runs over each step's rows (`ModelReference`), or its
log-probabilities are read from a file (`PrecomputedReference`). With adapters the policy itself
runs, with its adapters off or as they were at the start (`AdapterReference`): there is no copy. A
reward model has no reference (`NoReference`). Several references, from files, are in several.py.

Shapes: R responses of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.checkpoint import SavedAdapter, StartingModel
from megatron_prefix.config import Config
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.distributed import World
from megatron_prefix.engine import TrainBatch, build_model, score_rows
from megatron_prefix.model import TreeTransformerConfig, unwrap
from megatron_prefix.model.adapters import StartWeights, without_adapters
from megatron_prefix.model.parameters import model_fingerprint
from megatron_prefix.objectives import Objective, ScoreParts
from megatron_prefix.platform import on_device
from megatron_prefix.reference.places import pair_index, stored_index
from megatron_prefix.reference.scoring import score_dataset, with_reference
from megatron_prefix.reference.several import read_references
from megatron_prefix.reference.sidecars import read_heads, read_sidecar

ROUNDING = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "fp8": 2.0**-4}
"""Relative rounding of a log-probability between two ways to compute it, in units of what is
rounded (see `engine.step.response_noise`)."""


class Reference(Protocol):
    """What a run's rewards are measured from."""

    @property
    def rounding(self) -> float:
        """Relative rounding by which the policy's own log-probabilities may differ from these while
        both are the same model; 0 if both are computed in the same way."""

    @property
    def starts_policy(self) -> bool:
        """Whether it is the policy's initial model, so that the first step can be checked."""

    @property
    def identity(self) -> dict[str, Any]:
        """What it adds to the settings that a resumed run must have."""

    @property
    def anchor(self) -> int:
        """The one of several references that `ref_logps` are of."""

    def attach(
        self,
        rows: list[MicroBatch],
        batches: list[TrainBatch],
        step: int = 0,
        dataset: PreferenceDataset | None = None,
    ) -> list[TrainBatch]:
        """The same rows with reference log-probabilities; `step` counts from 0. Rows are of
        `dataset`, or of the data set that is trained on."""

    def score_rows(self, batches: list[TrainBatch]) -> list[Tensor] | None:
        """What the model computes of each row (`response_scores`), without alignments; None if no
        model runs."""

    def score(self, sampler: Sampler) -> np.ndarray | None:
        """Log-probabilities of every response of the sampler's data set, float64 [responses], or
        [K, responses] of several references; None if there is no reference."""

    def weights(self, step: int) -> np.ndarray | None:
        """Weight of each of several references in a step, float64 [K]."""

    def state(self, step: int) -> dict[str, Any] | None:
        """What a checkpoint after `step` steps has of it."""

    def saved_weights(self, saved: dict[str, Any] | None, checkpoint: str) -> np.ndarray | None:
        """`weights` from what a checkpoint has of it."""

    def check_state(self, saved: dict[str, Any] | None, step: int) -> None:
        """Raise InputError if a checkpoint of step `step` does not fit."""


class OneReference:
    """What is the same of a reference that is one model, or none."""

    starts_policy = True
    anchor = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def score_rows(self, batches: list[TrainBatch]) -> list[Tensor] | None:
        return None

    def weights(self, step: int) -> np.ndarray | None:
        return None

    def state(self, step: int) -> dict[str, Any] | None:
        return None

    def saved_weights(self, saved: dict[str, Any] | None, checkpoint: str) -> np.ndarray | None:
        return None

    def check_state(self, saved: dict[str, Any] | None, step: int) -> None:
        return


@dataclass(frozen=True, eq=False)
class ModelReference(OneReference):
    """A frozen model, run forward over the rows."""

    chunks: list[torch.nn.Module]
    world: World
    rounding: float
    parts: ScoreParts = ScoreParts()

    def attach(
        self,
        rows: list[MicroBatch],
        batches: list[TrainBatch],
        step: int = 0,
        dataset: PreferenceDataset | None = None,
    ) -> list[TrainBatch]:
        return with_reference(self.chunks, batches)

    def score_rows(self, batches: list[TrainBatch]) -> list[Tensor]:
        return score_rows(self.chunks, [batch.for_reference() for batch in batches])

    def score(self, sampler: Sampler) -> np.ndarray:
        return score_dataset(self.chunks, sampler, self.world, parts=self.parts)


@dataclass(frozen=True, eq=False)
class AdapterReference(OneReference):
    """The policy with its adapters off, or as they were at the start."""

    chunks: list[torch.nn.Module]
    world: World
    rounding: float
    start: StartWeights | None
    """None: adapters off."""
    parts: ScoreParts = ScoreParts()

    def attach(
        self,
        rows: list[MicroBatch],
        batches: list[TrainBatch],
        step: int = 0,
        dataset: PreferenceDataset | None = None,
    ) -> list[TrainBatch]:
        with self.in_place():
            return with_reference(self.chunks, batches)

    def score_rows(self, batches: list[TrainBatch]) -> list[Tensor]:
        with self.in_place():
            return score_rows(self.chunks, [batch.for_reference() for batch in batches])

    def score(self, sampler: Sampler) -> np.ndarray:
        with self.in_place():
            return score_dataset(self.chunks, sampler, self.world, parts=self.parts)

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, the policy computes what the reference computes."""
        return without_adapters(self.chunks) if self.start is None else self.start.in_place()

    @classmethod
    def of(
        cls,
        chunks: list[torch.nn.Module],
        lora: LoraConfig,
        world: World,
        rounding: float = 0.0,
        parts: ScoreParts | None = None,
    ) -> AdapterReference:
        """The reference that `lora` names, of a policy that has its adapters of the start."""
        start = None
        if lora.reference == "start":
            start = StartWeights.of([unwrap(chunk) for chunk in chunks])
        return cls(chunks, world, rounding, start, parts or ScoreParts())


@dataclass(frozen=True, eq=False)
class PrecomputedReference(OneReference):
    """Log-probabilities of every response of data sets as they are stored, float64 [responses] by
    the data set's fingerprint; `dataset` is the one that rows are made of."""

    dataset: PreferenceDataset
    logps: dict[str, np.ndarray]
    rounding: float = 0.0
    heads: dict[str, np.ndarray] | None = None
    """Of both sides of all pairs, float64 [pairs, 2], if the objective needs them."""

    @classmethod
    def read(
        cls,
        path: str,
        fingerprint: str,
        datasets: list[PreferenceDataset],
        rounding: float = 0.0,
        *,
        with_heads: bool = False,
    ) -> PrecomputedReference:
        """From a file that `score` wrote with the model of this fingerprint (`model_fingerprint`).

        Rows are made of the first data set.

        Raises InputError if the sidecar is of another model or data set.
        """
        logps = {
            data.fingerprint: np.concatenate(
                [read_sidecar(path, fingerprint, part.stored) for part in data.parts]
            )
            for data in datasets
        }
        heads = None
        if with_heads:
            heads = {
                data.fingerprint: np.concatenate([read_heads(path, part) for part in data.parts])
                for data in datasets
            }
        return cls(datasets[0], logps, rounding, heads)

    def attach(
        self,
        rows: list[MicroBatch],
        batches: list[TrainBatch],
        step: int = 0,
        dataset: PreferenceDataset | None = None,
    ) -> list[TrainBatch]:
        dataset = dataset or self.dataset
        name = dataset.fingerprint
        attached = []
        for row, batch in zip(rows, batches, strict=True):
            device, heads = batch.tokens.device, None
            logps = self.logps[name][stored_index(dataset, row)]
            if self.heads is not None:
                heads = on_device(self.heads[name][pair_index(dataset, row)], device)
            attached.append(batch.with_reference(on_device(logps, device), heads))
        return attached

    def score(self, sampler: Sampler) -> np.ndarray:
        name = sampler.dataset.fingerprint
        numbers = sampler.dataset.response_numbers
        logps = self.logps[name] if numbers is None else self.logps[name][numbers]
        if self.heads is None:
            return logps
        return np.concatenate([logps, self.heads[name].ravel()])


@dataclass(frozen=True)
class NoReference(OneReference):
    """For objectives that compare with nothing, such as those of reward models."""

    rounding: float = 0.0

    def attach(
        self,
        rows: list[MicroBatch],
        batches: list[TrainBatch],
        step: int = 0,
        dataset: PreferenceDataset | None = None,
    ) -> list[TrainBatch]:
        return batches

    def score(self, sampler: Sampler) -> None:
        return None


def open_reference(
    objective: Objective,
    config: Config,
    initial: StartingModel,
    fingerprint: str | None,
    datasets: list[PreferenceDataset],
    world: World,
    *,
    policy: Sequence[torch.nn.Module] = (),
    sampler: Sampler | None = None,
    valid: Sequence[PreferenceDataset] = (),
    has_own_rows: bool = False,
) -> Reference:
    """The reference that `objective` asks for; collective.

    `initial` gives the model's weights and `fingerprint` is that of the reference model; the first
    of `datasets` is trained on, in the steps of `sampler`. `valid` are the held-out data sets with
    the pairs that enter the loss. `policy` are the model chunks before their first step, which are
    the reference, too, if they have adapters. `has_own_rows` says that a model's rows are not those
    of the policy. Raises InputError if a sidecar is of another model
    or data set.
    """
    if objective.reference == "none":
        return NoReference()
    rounding = ROUNDING["fp8" if config.model.fp8 else config.model.dtype]
    if objective.mixture is not None:
        assert fingerprint is not None
        return read_references(
            config.loss,
            objective.mixture,
            fingerprint,
            datasets,
            rounding,
            with_heads=objective.parts.heads,
            sampler=sampler,
            valid=valid,
            seed=config.data.seed,
        )
    if objective.reference == "precomputed":
        path = config.loss.ref_logps
        assert path is not None and fingerprint is not None
        heads = objective.parts.heads
        return PrecomputedReference.read(path, fingerprint, datasets, rounding, with_heads=heads)
    if config.model.dtype == "float32" and not has_own_rows:
        rounding = 0.0  # policy and reference run the same rows, and float32 gives the same values
    parts = ScoreParts(heads=objective.parts.heads)
    if initial.lora is not None:
        return AdapterReference.of([*policy], initial.lora, world, rounding, parts)
    chunks = frozen_model(initial.transformer_config(config.train.seed, config.parallel), world)
    initial.load(chunks)
    return ModelReference(chunks, world, rounding, parts)


def reference_fingerprint(chunks: list[torch.nn.Module], adapter: SavedAdapter | None) -> str:
    """Fingerprint of the reference of `chunks`, which hold the policy of the start, with what
    `StartingModel.load` returned: the base's, unless the reference has the adapter. Collective."""
    config = unwrap(chunks[0]).config
    lora = config.lora
    fingerprint = adapter.base_fingerprint if adapter is not None else ""
    if adapter is None or lora is None or lora.reference == "start":
        fingerprint = model_fingerprint(chunks, with_adapters=lora is not None)
    if not config.fp8:
        return fingerprint
    # the same weights have other log-probabilities in another recipe
    recipe = f"{config.fp8} {config.fp8_recipe} {config.first_last_layers_bf16}"
    return sha256(f"{fingerprint} {recipe}".encode()).hexdigest()


def frozen_model(config: TreeTransformerConfig, world: World) -> list[torch.nn.Module]:
    """This rank's chunks of a model that is never trained: no gradients, evaluation mode."""
    return [chunk.eval().requires_grad_(False) for chunk in build_model(config, world)]
