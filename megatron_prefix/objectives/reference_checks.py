"""The keys of the loss section about several references -> ReferenceMixture, or their faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_prefix.config import LossConfig
from megatron_prefix.objectives.record import ObjectiveRecord, Unit
from megatron_prefix.objectives.reference_mixtures import ReferenceMixture

KEYS = (
    "reference_mixture",
    "reference_weights",
    "reference_clip",
    "reference_clip_split",
    "reference_anchor",
    "reference_window",
)


def mixture_of(loss: LossConfig) -> ReferenceMixture | None:
    """The mixture that a loss section without faults asks for; None without `references`."""
    if loss.references is None:
        return None
    given: dict[str, Any] = {
        "kind": loss.reference_mixture,
        "anchor": loss.reference_anchor,
        "clip": loss.reference_clip,
        "is_split": loss.reference_clip_split,
        "window": loss.reference_window,
    }
    if (weights := loss.reference_weights) is not None:
        given["weighting"] = (
            weights if isinstance(weights, str) else tuple(x / sum(weights) for x in weights)
        )
    return ReferenceMixture(
        names=tuple(file.name for file in loss.references),
        **{name: value for name, value in given.items() if value is not None},
    )


def mixture_faults(
    loss: LossConfig, chosen: Sequence[ObjectiveRecord], units: Mapping[str, Unit]
) -> Iterator[str]:
    """What is wrong with the keys about several references. `units` are those of the objectives
    that are not likelihoods, by name."""
    if loss.references is None:
        for key in KEYS:
            if (value := getattr(loss, key)) is not None:
                yield (
                    f"loss.{key} = {value}: has no effect without loss.references: remove it, or "
                    "list references"
                )
        return
    names = [file.name for file in loss.references]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"loss.references: two are named {name}: give each a name of its own"
    if loss.reference not in (None, "precomputed"):
        yield (
            f"loss.reference = {loss.reference} with loss.references: they are read from files: "
            "leave loss.reference out"
        )
    if not any(record.needs_reference() for record in chosen):
        title = " + ".join(record.name for record in chosen)
        yield f"loss.references: loss.loss_type: {title} has no reference: remove them"
    yield from _weight_faults(loss, names)
    yield from _option_faults(loss, names)
    yield from _unit_faults(loss, chosen, units)


def _weight_faults(loss: LossConfig, names: Sequence[str]) -> Iterator[str]:
    weights = loss.reference_weights
    if not isinstance(weights, list):
        return
    if len(weights) != len(names):
        yield (
            f"loss.reference_weights = {weights}: {len(weights)} weights for the {len(names)} "
            f"references {', '.join(names)}: give one for each"
        )
    elif not sum(weights) > 0:
        yield f"loss.reference_weights = {weights}: they sum to 0: give at least one above 0"


def _option_faults(loss: LossConfig, names: Sequence[str]) -> Iterator[str]:
    if loss.reference_anchor is not None and loss.reference_anchor not in names:
        yield (
            f"loss.reference_anchor = {loss.reference_anchor}: is none of the references "
            f"{', '.join(names)}: name one of them"
        )
    mixture = loss.reference_mixture or ReferenceMixture.kind
    for key in ("reference_clip", "reference_clip_split"):
        if (value := getattr(loss, key)) is not None and mixture != "harmonic":
            yield (
                f"loss.{key} = {value}: has no effect with loss.reference_mixture: {mixture}: "
                "remove it, or set harmonic"
            )
    weights = loss.reference_weights or ReferenceMixture.weighting
    if loss.reference_window is not None and weights != "sliding_window":
        yield (
            f"loss.reference_window = {loss.reference_window}: has no effect with "
            f"loss.reference_weights: {weights}: remove it, or set sliding_window"
        )


def _unit_faults(
    loss: LossConfig, chosen: Sequence[ObjectiveRecord], units: Mapping[str, Unit]
) -> Iterator[str]:
    """Losses over sets and responses have no pair that an adaptive weight or a shared clip could
    belong to."""
    for record in chosen:
        unit = units.get(record.name)
        if unit in ("response", "label") and record.needs_reference():
            yield (
                f"loss.references: loss.loss_type: {record.name} has one loss per response and "
                "takes one reference: set loss.reference and loss.ref_logps instead"
            )
        is_multi = loss.reference_mixture in (None, "multi_dpo")
        if record.scope == "step" and is_multi and loss.reference_weights == "adaptive":
            yield (
                f"loss.reference_weights = adaptive: weighs the loss of each pair, and "
                f"loss.loss_type: {record.name} has none of its own for a pair: choose other "
                "weights, or another loss.reference_mixture"
            )
        if unit != "set":
            continue
        if loss.reference_weights == "adaptive":
            yield (
                f"loss.reference_weights = adaptive: weighs per pair, and loss.loss_type: "
                f"{record.name} has one loss per set: choose other weights"
            )
        if loss.reference_mixture == "harmonic" and loss.reference_clip_split is not False:
            yield (
                f"loss.reference_clip_split = {loss.reference_clip_split}: the sides of a pair "
                f"share the clip, and loss.loss_type: {record.name} has one loss per set: set "
                "loss.reference_clip_split: false"
            )
