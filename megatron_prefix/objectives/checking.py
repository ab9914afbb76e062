"""A loss section -> the objective that it asks for, or every fault that it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_prefix.config import LossConfig
from megatron_prefix.errors import InputError
from megatron_prefix.objectives.member import Member
from megatron_prefix.objectives.objective import Objective
from megatron_prefix.objectives.record import ObjectiveRecord, Option, Unit
from megatron_prefix.objectives.reference_checks import mixture_faults, mixture_of
from megatron_prefix.objectives.registry import OBJECTIVES, find_record

MODELS = {"lm": "a language model", "reward": "a reward model"}
"""`model.kind` in words."""


def check(
    loss: LossConfig,
    model_kind: str | None = None,
    records: Mapping[str, ObjectiveRecord] = OBJECTIVES,
    *,
    num_labels: int = 1,
) -> Objective:
    """The objective that a loss section asks for; `num_labels` is the model's.

    Raises InputError with every fault: an unknown name, an objective of another kind of model
    (`model_kind` None takes any, and language models if there are two of a name), weights that do
    not fit the list, an option that no member uses or that one does not allow, members of
    different units, or a reference that is needed or of no use.
    """
    names = [loss.loss_type] if isinstance(loss.loss_type, str) else list(loss.loss_type)
    chosen = [find_record(name, records, model_kind) for name in names]
    faults = [
        *_list_faults(loss, names),
        *(fault for x in chosen for fault in _kind_faults(x, model_kind, records)),
        *_option_faults(loss, chosen, records),
        *_unit_faults(loss, chosen),
        *_reference_faults(loss, chosen),
        *mixture_faults(loss, chosen, _units(loss, chosen)),
        *_label_faults(loss, chosen, num_labels),
    ]
    if faults:
        raise InputError("; ".join(dict.fromkeys(faults)))
    needs = any(record.needs_reference() for record in chosen)
    reference = loss.reference or ("model" if needs else "none")
    mixture = mixture_of(loss)
    if mixture is not None:
        reference = "precomputed"
    weights = loss.loss_weights or [1.0] * len(chosen)
    return Objective(
        name=" + ".join(names),
        members=tuple(
            member
            for record, weight in zip(chosen, weights, strict=True)
            for member in _members(record, weight, loss, records, reference == "none")
        ),
        reference=reference,
        weighting=loss.weighting or "pair",
        comparisons=loss.comparisons or "all",
        ld_alpha=loss.ld_alpha,
        use_weighting=bool(loss.use_weighting),
        mixture=mixture,
        num_labels=num_labels,
        attribute=loss.attribute or 0,
        is_list=not isinstance(loss.loss_type, str),
    )


def _members(
    record: ObjectiveRecord,
    weight: float,
    loss: LossConfig,
    records: Mapping[str, ObjectiveRecord],
    is_alone: bool,
) -> Iterator[Member]:
    """The record itself, and what it adds."""
    options = {
        name: _value(loss, name, option) for name, option in _options(record, records).items()
    }
    yield Member(
        record=record,
        options={name: options[name] for name in record.options},
        weight=weight,
        omits_reference=is_alone and record.needs_reference(),
    )
    if record.adds is not None:
        added = records[record.adds.name]
        factor = 1.0 if record.adds.weight is None else options[record.adds.weight]
        if factor:
            own = {name: options[name] for name in added.options}
            yield Member(record=added, options=own, weight=weight * factor)


def _value(loss: LossConfig, name: str, option: Option) -> Any:
    given = getattr(loss, name)
    return option.default if given is None else given


def _options(
    record: ObjectiveRecord, records: Mapping[str, ObjectiveRecord]
) -> Mapping[str, Option]:
    """Options of a record, and of what it adds."""
    if record.adds is None:
        return record.options
    return {**record.options, **records[record.adds.name].options}


def _list_faults(loss: LossConfig, names: Sequence[str]) -> Iterator[str]:
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"loss.loss_type = {names}: {name} is in the list twice: remove one"
    weights = loss.loss_weights
    if weights is None:
        return
    if isinstance(loss.loss_type, str):
        yield (
            f"loss.loss_weights = {weights}: loss.loss_type = {names[0]} is not a list: remove the "
            "weights, or give a list of loss types"
        )
    elif len(weights) != len(names):
        yield (
            f"loss.loss_weights = {weights}: {len(weights)} weights for the {len(names)} loss "
            f"types {', '.join(names)}: give one for each"
        )


def _kind_faults(
    record: ObjectiveRecord, model_kind: str | None, records: Mapping[str, ObjectiveRecord]
) -> Iterator[str]:
    if model_kind in (None, record.model):
        return
    suitable = ", ".join(
        sorted(x.name for x in records.values() if x.variant(model_kind).model == model_kind)
    )
    yield (
        f"loss.loss_type = {record.name}: needs model.kind: {record.model}, and model.kind is "
        f"{model_kind}, which takes {suitable}: change one"
    )


def _option_faults(
    loss: LossConfig, chosen: Sequence[ObjectiveRecord], records: Mapping[str, ObjectiveRecord]
) -> Iterator[str]:
    """Options given that no member uses, or not with this value.

    None is not given, and a switch that is off asks for nothing.
    """
    users: dict[str, list[str]] = {}
    for record in {**records, **{x.name: x for x in chosen}}.values():
        for name in _options(record, records):
            users.setdefault(name, []).append(record.name)
    title = " + ".join(record.name for record in chosen)
    for name in users:
        value = getattr(loss, name)
        if value is None or value is False:
            continue
        takers = [x for x in chosen if name in _options(x, records)]
        known = ", ".join(sorted(users[name]))
        if not takers:
            yield (
                f"loss.{name} = {value}: loss.loss_type: {title} does not use it, only "
                f"{known}: remove it or set it to null, or change loss.loss_type"
            )
        for record in takers:
            yield from _value_faults(loss, name, _options(record, records)[name], record)
        if not takers:
            continue
        option = _options(takers[0], records)[name]
        others = [
            x.name
            for x in chosen
            if x not in takers and not (x.is_likelihood and option.spares_likelihoods)
        ]
        if option.of_all and others and value != option.default:
            yield (
                f"loss.{name} = {value}: {', '.join(others)} of loss.loss_type does not use it, "
                f"only {known}: remove it, or change loss.loss_type"
            )


def _value_faults(
    loss: LossConfig, name: str, option: Option, record: ObjectiveRecord
) -> Iterator[str]:
    value = getattr(loss, name)
    if option.is_allowed is not None and not option.is_allowed(value):
        yield f"loss.{name} = {value}: with {record.name} it must be {option.allowed}"
    if option.needs is not None:
        other, needed = option.needs
        if getattr(loss, other) != needed:
            yield (
                f"loss.{name} = {value}: has no effect with loss.{other} = "
                f"{getattr(loss, other)}: set loss.{other}: {needed}, or remove it"
            )


def _units(loss: LossConfig, chosen: Sequence[ObjectiveRecord]) -> dict[str, Unit]:
    """The unit of every objective that is not a likelihood, by name."""
    return {
        record.name: record.unit_of(
            {name: _value(loss, name, option) for name, option in record.options.items()}
        )
        for record in chosen
        if not record.is_likelihood
    }


def _unit_faults(loss: LossConfig, chosen: Sequence[ObjectiveRecord]) -> Iterator[str]:
    """Units that do not go together, and settings of pairs without a loss over pairs."""
    units = _units(loss, chosen)
    if len(set(units.values())) > 1:
        listed = ", ".join(f"{name} (per {unit})" for name, unit in units.items())
        yield f"loss.loss_type: a list cannot mix units: {listed}: take losses of one unit"
    others = [name for name, unit in units.items() if unit not in ("pair", "token")]
    for setting in ("weighting", "comparisons"):
        value = getattr(loss, setting)
        if value is not None and others:
            yield (
                f"loss.{setting} = {value}: {others[0]} has one loss per {units[others[0]]}, and "
                f"loss.{setting} is about pairs: remove it"
            )


def _reference_faults(loss: LossConfig, chosen: Sequence[ObjectiveRecord]) -> Iterator[str]:
    needing = [record for record in chosen if record.needs_reference()]
    if loss.ld_alpha is not None and loss.reference == "none":
        yield (
            f"loss.ld_alpha = {loss.ld_alpha} with loss.reference: none: it weighs log-ratios with "
            "a reference: remove one"
        )
    if loss.reference == "none":
        for record in needing:
            if not record.may_omit_reference:
                yield (
                    f"loss.reference = none: loss.loss_type: {record.name} compares with a "
                    "reference: set model or precomputed, or leave it out"
                )
    elif loss.reference is not None and not needing:
        record = chosen[0]
        yield (
            f"loss.reference = {loss.reference}: loss.loss_type: {record.name}, for "
            f"{MODELS[record.model]}, has no reference: leave it out"
        )


def _label_faults(
    loss: LossConfig, chosen: Sequence[ObjectiveRecord], num_labels: int
) -> Iterator[str]:
    """Several scores per response, of which only regression learns all."""
    if num_labels == 1:
        if loss.attribute is not None:
            yield (
                f"loss.attribute = {loss.attribute}: has no effect with model.num_labels: 1: "
                "remove it, or set model.num_labels"
            )
        return
    for record in chosen:
        if "label_scores" not in record.columns:
            yield (
                f"model.num_labels = {num_labels}: loss.loss_type: {record.name} trains one score "
                "per response: set loss.loss_type: regression, or remove model.num_labels"
            )
    if loss.attribute is not None and loss.attribute >= num_labels:
        yield (
            f"loss.attribute = {loss.attribute}: the attributes of model.num_labels: {num_labels} "
            f"are 0 to {num_labels - 1}: choose one of them"
        )
