"""The objectives by name, those of the user's own code among them.

A new objective is a function and its record in one file of this package; nothing else in the code
needs a change. Only an option that no objective has yet is also a field of `LossConfig`. An
objective of other code is registered (`register_objective`), or named by its place: the loss type
`package.module:NAME` is the record NAME of that module, which is looked for on the Python path.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from dataclasses import fields

from megatron_prefix.config import LossConfig
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import (
    pairwise,
    ranking,
    reference_free,
    reward,
    sides,
    sorted_pairs,
    unpaired,
)
from megatron_prefix.objectives.record import ObjectiveRecord
from megatron_prefix.objectives.table import LossInputs

FAMILIES = (pairwise, sides, sorted_pairs, unpaired, reference_free, ranking, reward)
OBJECTIVES = {record.name: record for family in FAMILIES for record in family.RECORDS}
PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""A loss type that names a module and a record in it."""
RETIRED = {
    "aot_pair": "aot_unpaired",
    "cdpo": "sigmoid with label_smoothing",
    "dpo": "sigmoid",
    "dpop": "sigmoid with dpop_lambda",
    "kto_pair": "kto",
    "rpo": "[sigmoid, sft] with loss_weights: [1.0, X]",
    "slic": "hinge",
}
"""Names that other programs or versions give an objective, and how it is spelled."""


def register_objective(record: ObjectiveRecord) -> ObjectiveRecord:
    """Add an objective, so that `loss.loss_type` may be its name in this process.

    Raises ValueError if the name is taken, or if the record has columns or options that do not
    exist. Returns the record.
    """
    if OBJECTIVES.get(record.name, record) is not record:
        raise ValueError(f"an objective {record.name!r} is registered already: take another name")
    check_record(record)
    OBJECTIVES[record.name] = record
    return record


def check_record(record: ObjectiveRecord) -> None:
    """Raise ValueError unless columns and options of a record are known."""
    known = {field.name for field in fields(LossInputs)} | set(vars(LossInputs))
    if unknown := [column for column in record.columns if column not in known]:
        raise ValueError(f"objective {record.name!r} reads columns that no table has: {unknown}")
    known = {field.name for field in fields(LossConfig)}
    if unknown := [option for option in record.options if option not in known]:
        raise ValueError(
            f"objective {record.name!r} has options that the loss section does not have: {unknown}"
        )


def find_record(
    name: str, records: Mapping[str, ObjectiveRecord], model_kind: str | None
) -> ObjectiveRecord:
    """The record that a loss type names. Raises InputError if there is none."""
    if name in records:
        return records[name].variant(model_kind)
    if PLACE.fullmatch(name):
        return _imported(name).variant(model_kind)
    hint = ""
    if name in RETIRED:
        hint = f"here it is {RETIRED[name]}; "
    elif near := difflib.get_close_matches(name, records, n=1, cutoff=0.5):
        hint = f"did you mean {near[0]}? "
    known = ", ".join(sorted(records))
    raise InputError(f"loss.loss_type = {name!r}: unknown ({hint}known: {known})")


def _imported(place: str) -> ObjectiveRecord:
    module, _, name = place.partition(":")
    try:
        record = getattr(importlib.import_module(module), name)
    except Exception as error:  # another's module may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"loss.loss_type = {place!r}: cannot be imported ({reason}): name a module on the "
            "Python path and an ObjectiveRecord in it"
        ) from error
    if not isinstance(record, ObjectiveRecord):
        raise InputError(
            f"loss.loss_type = {place!r}: is a {type(record).__name__}, not an ObjectiveRecord"
        )
    try:
        check_record(record)
    except ValueError as error:
        raise InputError(f"loss.loss_type = {place!r}: {error}") from None
    return record
