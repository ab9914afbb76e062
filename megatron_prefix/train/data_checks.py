"""Whether a data set has what the objective and its sharing mode need, and which settings the
objective leaves without effect.
"""

from __future__ import annotations

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.data.steps import StepColumns
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import Objective


def check_columns(
    objective: Objective, dataset: PreferenceDataset, setting: str, *, is_trained_on: bool = False
) -> None:
    """Refuse a data set that lacks something the objective reads: margins, scores or ranks; if it
    `is_trained_on`, also betas.

    The message counts what is missing and names the first group.
    """
    if is_trained_on:
        _check_betas(objective, dataset, setting)
    if len(dataset.parts) > 1:
        for part in dataset.parts:
            check_columns(objective, part, setting)
        return
    columns = set(objective.columns)
    group_of_pair = np.repeat(np.arange(len(dataset)), np.diff(dataset.group_pairs))
    if "margins" in columns:
        _refuse_missing(
            np.isnan(dataset.pair_margins),
            group_of_pair,
            dataset,
            setting,
            f"pairs in {dataset.prefix} have no margin",
            f"{_asker(objective, 'margin')} needs one for each: give every record a margin and "
            "build again, or remove loss.margin",
        )
    _check_weights(objective, dataset, setting)
    group = np.repeat(np.arange(len(dataset)), np.diff(dataset.group_responses))
    if columns & {"chosen_labels", "rejected_labels"}:
        _refuse_missing(
            np.isnan(dataset.response_scores)[dataset.pair_sides].any(axis=1),
            group_of_pair,
            dataset,
            setting,
            f"pairs in {dataset.prefix} have a response without a score",
            f"loss.loss_type: {objective.name} needs one for both: give every response a score "
            "and build again",
        )
    for column, values, word in (
        ("set_labels", np.isnan(dataset.response_scores), "score"),
        ("set_ranks", np.asarray(dataset.response_ranks) < 0, "rank"),
    ):
        if column not in columns:
            continue
        missing = values & _is_compared(dataset, group)
        if word == "rank":  # an unranked response takes no part, but a set needs two
            missing = missing & _is_in_pair(dataset)
        _refuse_missing(
            missing,
            group,
            dataset,
            setting,
            f"responses in {dataset.prefix} have no {word}",
            f"loss.loss_type: {objective.name} needs one for each: build from records whose "
            f"responses have {word}s",
        )
    if "desirable" in columns:
        _check_labels(objective, dataset, setting, group)
    if objective.num_labels > 1:
        _check_attributes(objective.num_labels, dataset, setting)
    elif "label_values" in columns and np.isnan(dataset.response_scores).all():
        raise InputError(
            f"{setting}: no response in {dataset.prefix} has a score, but loss.loss_type: "
            f"{objective.name} learns scores: build from records whose responses have scores"
        )


def _check_labels(
    objective: Objective, dataset: PreferenceDataset, setting: str, group: np.ndarray
) -> None:
    """Refuse responses without a clear label, for an objective that judges each by itself."""
    sides = dataset.pair_sides
    is_chosen, is_rejected = np.zeros((2, len(group)), bool)
    is_chosen[sides[:, 0]], is_rejected[sides[:, 1]] = True, True
    asks = f"loss.loss_type: {objective.name} judges each response by itself"
    _refuse_missing(
        is_chosen & is_rejected,
        group,
        dataset,
        setting,
        f"responses in {dataset.prefix} are chosen in one pair and rejected in another",
        f"{asks}: build from pairs of two responses, or from unpaired records with a label",
    )
    scores = np.asarray(dataset.response_scores)
    _refuse_missing(
        ~is_chosen & ~is_rejected & ~np.isnan(scores) & (scores != 0) & (scores != 1),
        group,
        dataset,
        setting,
        f"responses in {dataset.prefix} have no pair and another score than 1 or 0",
        f"{asks} as desirable (1) or undesirable (0): build from unpaired records with a label",
    )
    if np.isnan(dataset.desirable).all():
        raise InputError(
            f"{setting}: no response in {dataset.prefix} has a pair or a label, but {asks}: build "
            "from unpaired records with a label, or from pairs"
        )


def _check_weights(objective: Objective, dataset: PreferenceDataset, setting: str) -> None:
    """Refuse pairs with weights other than 1 for an objective that has no place for them."""
    unweighted = [x.name for x in objective.members if not x.record.takes_weights]
    if not unweighted:
        return
    weights = StepColumns.of_dataset(dataset, objective.weighting).pair_weights
    _refuse_missing(
        weights != 1,
        np.repeat(np.arange(len(dataset)), np.diff(dataset.group_pairs)),
        dataset,
        setting,
        f"pairs in {dataset.prefix} have another weight than 1 under loss.weighting: "
        f"{objective.weighting}",
        f"loss.loss_type: {unweighted[0]} sorts the pairs of a step, so that no loss "
        "belongs to one pair: build without weights, or set loss.weighting: pair",
    )


def _check_betas(objective: Objective, dataset: PreferenceDataset, setting: str) -> None:
    """Refuse `loss.pair_beta` if no pair has a beta."""
    if "betas" in objective.columns and np.isnan(dataset.pair_betas).all():
        raise InputError(
            f"loss.pair_beta: true: no pair in {setting} = {dataset.prefix} has a beta of its "
            "own: give records a column beta and build again, or remove loss.pair_beta"
        )


def _check_attributes(num_labels: int, dataset: PreferenceDataset, setting: str) -> None:
    values = dataset.response_attributes
    if values.shape[1] != num_labels:
        has = f"{values.shape[1]} attributes" if values.shape[1] else "no attributes"
        raise InputError(
            f"{setting}: the responses of {dataset.prefix} have {has}, and model.num_labels is "
            f"{num_labels}: build with {num_labels} --attributes, or change model.num_labels"
        )
    for name, column in zip(dataset.attribute_names, values.T, strict=True):
        if np.isnan(column).all():
            raise InputError(
                f"{setting}: no response of {dataset.prefix} has a score for the attribute {name}: "
                "correct the names of build --attributes, or leave it out"
            )


def _asker(objective: Objective, option: str) -> str:
    if objective.options.get(option):
        return f"loss.{option}: true"
    return f"loss.loss_type: {objective.name}"


def _refuse_missing(
    missing: np.ndarray,
    group: np.ndarray,
    dataset: PreferenceDataset,
    setting: str,
    fault: str,
    remedy: str,
) -> None:
    """`missing` and `group` have an entry for each pair or response."""
    if not missing.any():
        return
    first = int(group[np.argmax(missing)])
    raise InputError(
        f"{setting}: {int(missing.sum())} of the {len(missing)} {fault} (first in group {first}, "
        f"record {int(dataset.group_records[first])}), but {remedy}"
    )


def _is_in_pair(dataset: PreferenceDataset) -> np.ndarray:
    """Whether each response is in a pair, [R]."""
    is_in = np.zeros(len(dataset.response_sets), bool)
    is_in[dataset.pair_sides.ravel()] = True
    return is_in


def _is_compared(dataset: PreferenceDataset, group: np.ndarray) -> np.ndarray:
    """Whether each response is in a comparison set that has a pair, [R]."""
    sets = np.asarray(dataset.response_sets, np.int64)
    keys = group * (int(sets.max(initial=0)) + 1) + sets
    return np.isin(keys, keys[_is_in_pair(dataset)])


def refuse_unused_reference(config: Config, objective: Objective) -> None:
    """Refuse `lora.reference` if the objective has no reference."""
    if config.lora is not None and config.lora.reference and objective.reference == "none":
        raise InputError(
            f"lora.reference = {config.lora.reference} has no effect: loss.loss_type: "
            f"{objective.name} runs without a reference; leave it out"
        )


def run_sharing(objective: Objective, sharing: str) -> str:
    """The sharing mode in which the rows are laid out: an objective that needs whole comparison
    sets has no pairs to lay out, so `none` is one sequence per response."""
    if not objective.needs_sets:
        return sharing
    if sharing == "pair":
        raise InputError(
            f"data.sharing = pair: loss.loss_type: {objective.name} needs all responses of a "
            "comparison set in one row, and pair lays out each pair by itself: use tree, response "
            "or none"
        )
    return "response" if sharing == "none" else sharing
