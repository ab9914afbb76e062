"""Several references: the log-probabilities of any number of models, each in its own file.

Shapes: K references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from megatron_prefix.config import LossConfig
from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.engine import TrainBatch
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import ReferenceColumns, ReferenceMixture
from megatron_prefix.platform import on_device
from megatron_prefix.reference.places import pair_index, response_index
from megatron_prefix.reference.sidecars import read_heads, read_sidecar, sidecar_model
from megatron_prefix.reference.weights import (
    FixedWeights,
    SlidingWindow,
    StepWeights,
    Thompson,
    gaps_per_token,
    normalised,
    pairs_of_step,
    preferred_chosen,
    validation_accuracy,
    validation_confidence,
)

CLOSE = 1e-4
"""What weights or counts of a resumed run may differ from those in its checkpoint."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SeveralReferences:
    """References by name, all of the data sets' responses under each."""

    mixture: ReferenceMixture
    dataset: PreferenceDataset
    """The one that rows are made of."""
    models: tuple[str, ...]
    """Fingerprint of each reference's model, [K]."""
    logps: dict[str, np.ndarray]
    """Float64 [K, responses] by the fingerprint of the data set."""
    heads: dict[str, np.ndarray] | None
    """Float64 [K, pairs, 2], if the objective needs them."""
    anchor: int
    starts_policy: bool
    """Whether the anchor is the policy's initial model."""
    step_weights: StepWeights | None
    """None if weights are made per pair."""
    rounding: float

    def score_rows(self, batches: list[TrainBatch]) -> None:
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the rewards; a resumed run must have the same."""
        names = self.mixture.names
        settings = {f"loss.{key}": value for key, value in self.mixture.settings().items()}
        models = dict(zip(names, self.models, strict=True))
        return {"loss.references": models, "loss.reference_anchor": names[self.anchor], **settings}

    def attach(
        self,
        rows: list[MicroBatch],
        batches: list[TrainBatch],
        step: int = 0,
        dataset: PreferenceDataset | None = None,
    ) -> list[TrainBatch]:
        """The same rows with every reference and the weights of the step; no objective of several
        references takes rows of another `dataset`."""
        assert dataset in (None, self.dataset), dataset
        return [
            batch.with_several_references(self._columns(row, batch, step))
            for row, batch in zip(rows, batches, strict=True)
        ]

    def _columns(self, row: MicroBatch, batch: TrainBatch, step: int) -> ReferenceColumns:
        tensor = partial(on_device, device=batch.tokens.device)
        name, weights, heads = self.dataset.fingerprint, self.weights(step), None
        if self.heads is not None:
            heads = tensor(self.heads[name][:, pair_index(self.dataset, row)])
        return ReferenceColumns(
            logps=tensor(self.logps[name][:, response_index(self.dataset, row)]),
            weights=None if weights is None else tensor(weights),
            anchor=self.anchor,
            heads=heads,
        )

    def score(self, sampler: Sampler) -> np.ndarray:
        """Log-probabilities of every response, float64 [K, responses], and heads after them."""
        name = sampler.dataset.fingerprint
        if self.heads is None:
            return self.logps[name]
        return np.concatenate([self.logps[name], self.heads[name].reshape(len(self.models), -1)], 1)

    def weights(self, step: int) -> np.ndarray | None:
        """Weights of a step, float64 [K]; None if they are made per pair."""
        return None if self.step_weights is None else self.step_weights.weights(step)

    def state(self, step: int) -> dict[str, Any] | None:
        """The weights that the next step after `step` steps has, for a checkpoint; they can be
        computed again, so a resumed run only compares them."""
        if self.step_weights is None:
            return None
        return {
            "names": list(self.mixture.names),
            "rule": self.mixture.weighting,
            "weights": self.step_weights.weights(step).tolist(),
            "counts": self.step_weights.counts(step),
        }

    def check_state(self, saved: dict[str, Any] | None, step: int) -> None:
        """Raise InputError unless a checkpoint of step `step` has the weights computed here."""
        own = self.state(step)
        if own is None or saved is None:
            return
        for key in ("weights", "counts"):
            ours, theirs = np.array(own[key]), np.array(saved[key])
            if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=CLOSE):
                raise InputError(
                    f"loss.reference_weights = {self.mixture.weighting}: the references' {key} "
                    f"after step {step} are {own[key]} by the sidecars and the plan, but "
                    f"{saved[key]} in the checkpoint: resume with the files of that run"
                )

    def saved_weights(self, saved: dict[str, Any] | None, checkpoint: str) -> np.ndarray:
        """The weights that a checkpoint's next step would have had, float64 [K], from what `state`
        wrote. Raises InputError if it was not written under this rule for these references."""
        mixture = self.mixture
        own = {"names": list(mixture.names), "rule": mixture.weighting}
        if saved is None or any(saved.get(key) != value for key, value in own.items()):
            raise InputError(
                f"loss.reference_weights = {mixture.weighting}: {checkpoint} has no weights of "
                f"this rule for the references {', '.join(mixture.names)}: give the weights as a "
                "list"
            )
        return np.array(saved["weights"], np.float64)


def read_references(
    loss: LossConfig,
    mixture: ReferenceMixture,
    fingerprint: str,
    datasets: Sequence[PreferenceDataset],
    rounding: float,
    *,
    with_heads: bool = False,
    sampler: Sampler | None = None,
    valid: Sequence[PreferenceDataset] = (),
    seed: int = 0,
) -> SeveralReferences:
    """The references that a loss section lists, for these data sets; rows are made of the first.

    `fingerprint` is that of the policy's initial model. `sampler` has the plan of the run; without
    it every step is the first one. `valid` are the held-out data sets, with the pairs that count.
    Raises InputError if a file is of another data set or tokenizer, or the anchor is not clear.
    """
    assert loss.references is not None
    paths = [file.ref_logps for file in loss.references]
    logps = {data.fingerprint: _own(data, _read(read_sidecar, paths, data)) for data in datasets}
    heads = None
    if with_heads:
        heads = {
            data.fingerprint: _read(lambda path, _, part: read_heads(path, part), paths, data)
            for data in datasets
        }
    models = tuple(sidecar_model(path) for path in paths)
    anchor = _anchor(mixture, models, fingerprint)
    return SeveralReferences(
        mixture=mixture,
        dataset=datasets[0],
        models=models,
        logps=logps,
        heads=heads,
        anchor=anchor,
        starts_policy=models[anchor] == fingerprint,
        step_weights=_step_weights(mixture, logps, sampler, valid, seed),
        rounding=rounding,
    )


def _own(data: PreferenceDataset, stored: np.ndarray) -> np.ndarray:
    """Of values of all responses in the files [K, …], those of the data set, [K, R]."""
    return stored if data.response_numbers is None else stored[:, data.response_numbers]


def _read(reader: Any, paths: Sequence[str], data: PreferenceDataset) -> np.ndarray:
    """Arrays of every file for a data set, or for those that it joins, [K, …]."""
    return np.stack(
        [np.concatenate([reader(path, None, part.stored) for part in data.parts]) for path in paths]
    )


def _anchor(mixture: ReferenceMixture, models: Sequence[str], fingerprint: str) -> int:
    if mixture.anchor is not None:
        return mixture.names.index(mixture.anchor)
    own = [name for name, model in zip(mixture.names, models, strict=True) if model == fingerprint]
    if len(own) == 1:
        return mixture.names.index(own[0])
    fault = f"{', '.join(own)} all have" if own else "none of them has"
    raise InputError(
        f"loss.references {', '.join(mixture.names)}: {fault} the policy's initial model "
        f"({fingerprint[:16]}…): set loss.reference_anchor to the reference that others are "
        "clipped around"
    )


def _step_weights(
    mixture: ReferenceMixture,
    logps: dict[str, np.ndarray],
    sampler: Sampler | None,
    valid: Sequence[PreferenceDataset],
    seed: int,
) -> StepWeights | None:
    rule = mixture.weighting
    equal = np.full(len(mixture.names), 1 / len(mixture.names))
    if rule == "adaptive":
        return None
    if not isinstance(rule, str):
        return FixedWeights(normalised(np.array(rule)))
    if rule == "validation_accuracy":
        preferred = [preferred_chosen(logps[data.fingerprint], data.pair_sides) for data in valid]
        return FixedWeights(validation_accuracy(preferred))
    if rule == "validation_confidence":
        gaps = [
            gaps_per_token(logps[data.fingerprint], data.pair_sides, data.own_tokens)
            for data in valid
        ]
        return FixedWeights(validation_confidence(gaps))
    if rule == "uniform" or (sampler is None and rule == "sliding_window"):
        return FixedWeights(equal)
    if sampler is None:
        return Thompson(np.zeros((len(equal), 0)), lambda step: np.zeros(0, np.int64), seed)
    data = sampler.dataset
    preferred_KP = preferred_chosen(logps[data.fingerprint], data.pair_sides)
    pairs = partial(pairs_of_step, sampler)
    if rule == "sliding_window":
        return SlidingWindow(preferred_KP, pairs, mixture.window)
    return Thompson(preferred_KP, pairs, seed)
