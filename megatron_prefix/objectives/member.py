"""Member: an objective's record with the options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_prefix.objectives.record import LossOutputs, ObjectiveRecord, Unit
from megatron_prefix.objectives.table import LossInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """A record with its options, and what multiplies its mean in the loss of the run."""

    record: ObjectiveRecord
    options: Mapping[str, Any]
    """Every option of the record: the value given, or the default."""
    weight: float = 1.0
    omits_reference: bool = False
    """The reference's log-probabilities count as 0."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def unit(self) -> Unit:
        return self.record.unit_of(self.options)

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of the data under these options: names of `LossInputs`."""
        columns = self.record.all_columns(self.options)
        return tuple(x for x in columns if not (self.omits_reference and is_of_reference(x)))

    @property
    def parameters(self) -> dict[str, Any]:
        """The options that the function takes, by name."""
        options = self.record.options
        return {
            name: value
            for name, value in self.options.items()
            if options[name].column is None and not options[name].is_outside
        }

    def outputs(self, inputs: LossInputs) -> LossOutputs:
        """Loss and metrics of a table. Raises ValueError if a column is absent."""
        columns = {name: getattr(inputs, name) for name in self.columns}
        parameters = self.parameters
        for name, option in self.record.options.items():
            if option.replaces is not None and option.column is not None and self.options[name]:
                own, default = columns.pop(option.column), self.options[option.replaces]
                if own is None:
                    raise ValueError(f"loss.{name}: the table has no {option.column}")
                parameters[option.replaces] = own.where(~own.isnan(), default)
        if missing := [name for name, column in columns.items() if column is None]:
            raise ValueError(
                f"loss.loss_type: {self.name} needs {', '.join(missing)}, which the rows do not "
                "have: train with megatron-prefix train, or Trainer"
            )
        if self.omits_reference:
            zeros = inputs.margins.new_zeros(len(inputs.pairs))
            columns |= {x: zeros for x in self.record.columns if is_of_reference(x)}
        return self.record.function(**columns, **parameters)

    @property
    def replaces_options(self) -> bool:
        """Whether pairs have values of their own for an option."""
        options = self.record.options
        return any(options[name].replaces and value for name, value in self.options.items())

    @property
    def first_value(self) -> float | None:
        """Mean loss at the first step, when policy and reference are the same model; None if it
        depends on the data, or there is no reference."""
        first = None if self.omits_reference or self.replaces_options else self.record.first
        return None if first is None or first.value is None else first.value(**self.options)


def is_of_reference(column: str) -> bool:
    """Whether a column of `LossInputs` is of the reference."""
    return column.startswith(("ref_", "set_ref_"))
