"""The objectives by name, and the one that a configuration asks for.

A new objective is a function and its record in one file of this package; nothing else in the code
needs a change. Only an option that no objective has yet is also a field of `LossConfig`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_prefix.config import LossConfig
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import pairwise, reward
from megatron_prefix.objectives.record import LossInputs, LossOutputs, ObjectiveRecord

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES = {record.name: record for record in (*pairwise.RECORDS, *reward.RECORDS)}
MODELS = {"lm": "a language model", "reward": "a reward model"}
"""`model.kind` in words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """A record with the options of a run."""

    record: ObjectiveRecord
    options: Mapping[str, Any]
    """Every option of the record: the value given, or the default."""
    reference: Literal["model", "precomputed", "none"]
    weighting: Literal["pair", "group"]

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def columns(self) -> tuple[str, ...]:
        """What it needs of the data under these options: names of `LossInputs`."""
        switched = (x.column for name, x in self.record.options.items() if self.options[name])
        return (*self.record.columns, *(column for column in switched if column is not None))

    @property
    def parameters(self) -> dict[str, Any]:
        """The options that the function takes, by name."""
        options = self.record.options
        return {name: x for name, x in self.options.items() if options[name].column is None}

    def outputs(self, inputs: LossInputs) -> LossOutputs:
        """Loss and rewards of every pair. Raises ValueError if a column is absent."""
        columns = {name: getattr(inputs, name) for name in self.columns}
        return self.record.function(**columns, **self.parameters)

    def logp_metrics(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Log-probabilities [P] by the name of their logged mean; a reward model has none."""
        if self.record.model != "lm":
            return {}
        return {
            "logps/chosen": inputs.chosen_logps.detach(),
            "logps/rejected": inputs.rejected_logps.detach(),
        }

    @property
    def rewards_per_nat(self) -> float:
        """Reward per nat of log-ratio, as the record declares it."""
        rewards_per_nat = self.record.rewards_per_nat
        return 1.0 if rewards_per_nat is None else float(rewards_per_nat(**self.parameters))

    @property
    def first_value(self) -> float | None:
        """Loss at the first step, when policy and reference are the same model; None if it
        depends on the data."""
        first = self.record.first
        return None if first is None else first.value(**self.parameters)

    @property
    def first_formula(self) -> str:
        """That loss as a formula."""
        first = self.record.first
        return "" if first is None else first.formula

    @property
    def first_steepness(self) -> float:
        """Largest slope of that loss: its change per unit by which both rewards move, in the same
        or opposite directions."""
        first = self.record.first
        return 0.0 if first is None else first.steepness(**self.parameters)

    @property
    def is_first_per_token(self) -> bool:
        """Whether that slope is for rewards of one token, and an n-th of it for n tokens."""
        first = self.record.first
        return first is not None and first.per_token


def check(
    loss: LossConfig,
    model_kind: str | None = None,
    records: Mapping[str, ObjectiveRecord] = OBJECTIVES,
) -> Objective:
    """The objective that a loss section asks for.

    Raises InputError with every fault: an unknown name, an objective of another kind of model
    (`model_kind` None takes any), an option that the objective does not use or allow, or a
    reference that it needs or has no use for.
    """
    record = records.get(loss.loss_type)
    if record is None:
        raise InputError(_unknown_name(loss.loss_type, records))
    faults = [
        *_kind_faults(record, model_kind, records),
        *_option_faults(loss, record, records),
        *_reference_faults(loss, record),
    ]
    if faults:
        raise InputError("; ".join(faults))
    given = {name: getattr(loss, name) for name in record.options}
    return Objective(
        record=record,
        options={
            name: option.default if given[name] is None else given[name]
            for name, option in record.options.items()
        },
        reference=loss.reference or ("model" if _needs_reference(record) else "none"),
        weighting=loss.weighting or "pair",
    )


def _unknown_name(name: str, records: Mapping[str, ObjectiveRecord]) -> str:
    near = difflib.get_close_matches(name, records, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"loss.loss_type = {name!r}: unknown ({hint}known: {', '.join(sorted(records))})"


def _kind_faults(
    record: ObjectiveRecord, model_kind: str | None, records: Mapping[str, ObjectiveRecord]
) -> Iterator[str]:
    if model_kind in (None, record.model):
        return
    suitable = ", ".join(sorted(x.name for x in records.values() if x.model == model_kind))
    yield (
        f"loss.loss_type = {record.name}: needs model.kind: {record.model}, and model.kind is "
        f"{model_kind}, which takes {suitable}: change one"
    )


def _option_faults(
    loss: LossConfig, record: ObjectiveRecord, records: Mapping[str, ObjectiveRecord]
) -> Iterator[str]:
    """Options given that the objective does not use, or not with this value.

    None is not given, and a switch that is off asks for nothing.
    """
    names = dict.fromkeys(name for x in records.values() for name in x.options)
    for name in names:
        value, option = getattr(loss, name), record.options.get(name)
        if value is None or value is False:
            continue
        if option is None:
            users = ", ".join(sorted(x.name for x in records.values() if name in x.options))
            yield (
                f"loss.{name} = {value}: loss.loss_type: {record.name} does not use it, only "
                f"{users}: remove it or set it to null, or change loss.loss_type"
            )
        elif option.is_allowed is not None and not option.is_allowed(value):
            yield f"loss.{name} = {value}: with {record.name} it must be {option.allowed}"


def _reference_faults(loss: LossConfig, record: ObjectiveRecord) -> Iterator[str]:
    if _needs_reference(record):
        if loss.reference == "none":
            yield (
                f"loss.reference = none: loss.loss_type: {record.name} compares with a "
                "reference: set model or precomputed, or leave it out"
            )
    elif loss.reference in ("model", "precomputed"):
        yield (
            f"loss.reference = {loss.reference}: loss.loss_type: {record.name}, for "
            f"{MODELS[record.model]}, has no reference: leave it out"
        )


def _needs_reference(record: ObjectiveRecord) -> bool:
    return any(column.startswith("ref_") for column in record.columns)
