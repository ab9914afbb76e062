"""Evaluation: scores of a data set's responses -> loss, rewards, accuracy.

Only the scores come from rows and ranks; the metrics are a plain function of arrays over the data
set's pairs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prefix.checkpoint import (
    StartingModel,
    resolve_checkpoint,
    resolve_starting_model,
)
from megatron_prefix.config import Config
from megatron_prefix.data.steps import Sampler, StepColumns
from megatron_prefix.data.store import PreferenceDataset, check_one_vocabulary
from megatron_prefix.distributed import World, open_session
from megatron_prefix.errors import InputError
from megatron_prefix.model.adapters import as_reference
from megatron_prefix.objectives import (
    LossInputs,
    Objective,
    ReferenceColumns,
    ScoreParts,
    check,
)
from megatron_prefix.reference import (
    frozen_model,
    open_reference,
    reference_fingerprint,
    score_dataset,
)
from megatron_prefix.train.accuracies import (
    accuracies_of_kinds,
    accuracies_of_subsets,
    read_subsets,
    subset_of_pairs,
)
from megatron_prefix.train.data_checks import check_columns, refuse_unused_reference
from megatron_prefix.train.row_costs import ModelCosts
from megatron_prefix.train.samplers import (
    EVALUATION_GROUPS,
    evaluation_block,
    evaluation_sampler,
    mismatch_sampler,
    open_valid_sets,
    valid_setting,
)

PER_RESPONSE = {"lm": "logp", "reward": "reward"}
"""Key of a response's score in `--per-response`, by `model.kind`."""


def evaluate(
    config: Config,
    load: str | None,
    per_response: str | None,
    subsets: tuple[str, str] | None = None,
) -> dict[str, float]:
    """Score `data.valid` with the policy and the reference, and return the metrics.

    If `data.valid` names several data sets, the metrics of NAME have keys `NAME/…`. The policy is
    the checkpoint `load`, or the initial model. `per_response` names a file for every response's
    log-probability under the policy, or its reward; `subsets` a file and the key of its records
    that names their subsets. Raises InputError.
    """
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    if config.data.valid is None:
        raise InputError("data.valid is not set: name the data set to evaluate on")
    weights = None if load is None else resolve_checkpoint(load)
    if per_response is not None and not Path(per_response).absolute().parent.is_dir():
        raise InputError(f"--per-response {per_response}: no such directory; make it first")
    names = None if subsets is None else read_subsets(*subsets, len(config.data.valid_sets))
    with open_session(config) as world:
        datasets = open_valid_sets(config, world, needs_pairs=objective.needs_pairs)
        check_one_vocabulary([*datasets.values()])
        initial = resolve_starting_model(config.model, [*datasets.values()], config.lora)
        refuse_unused_reference(config, objective)
        costs = ModelCosts(initial)
        samplers = [
            evaluation_sampler(config, objective, dataset, world, costs)
            for dataset in datasets.values()
        ]
        model = frozen_model(initial.transformer_config(config.train.seed, config.parallel), world)
        for name, dataset in datasets.items():
            check_columns(objective, dataset, valid_setting(name))
        others = {
            name: other
            for name, own in zip(datasets, samplers, strict=True)
            if (
                other := mismatch_sampler(config, objective, own, valid_setting(name), world, costs)
            )
        }
        every = [*samplers, *others.values()]
        if objective.reference == "none":
            scores = _own_scores(objective, config, initial, model, weights, every, world)
            ref_logps: Sequence[np.ndarray | None] = [None] * len(every)
            mixed: dict[str, Any] = {}
        else:
            scores, ref_logps, mixed = _logps(
                objective, config, initial, model, weights, every, world
            )
        if per_response is not None:
            key, own = PER_RESPONSE[config.model.kind], scores[: len(samplers)]
            world.once(lambda: _write_records(per_response, datasets, own, objective.parts, key))
    metrics: dict[str, float] = {}
    count = len(samplers)
    logratios = {
        name: mismatch_logratios(other, own, reference)
        for (name, other), own, reference in zip(
            others.items(), scores[count:], ref_logps[count:], strict=True
        )
    }
    for i, (name, sampler) in enumerate(zip(datasets, samplers, strict=True)):
        prefix = f"{name}/" if name else ""
        values = preference_metrics(
            objective,
            sampler.dataset,
            scores[i],
            ref_logps[i],
            evaluation_block(config),
            kl_logratios=logratios.get(name),
            subsets=None if names is None else subset_of_pairs(sampler.dataset, names),
            **mixed,
        )
        metrics |= {f"{prefix}{key}": value for key, value in values.items()}
    return metrics


def _own_scores(
    objective: Objective,
    config: Config,
    initial: StartingModel,
    model: list[torch.nn.Module],
    weights: Path | None,
    samplers: list[Sampler],
    world: World,
) -> list[np.ndarray]:
    """The model's score of every response, float64 [responses] per data set, without a
    reference."""
    adapter = initial.load(model) if weights is None or initial.lora is not None else None
    if weights is not None:
        initial.load_trained(weights, model, adapter)
    else:
        if world.is_main and (note := initial.note(config.train.seed)) is not None:
            print(note, file=sys.stderr)
    return [score_dataset(model, x, world, parts=objective.parts) for x in samplers]


def _logps(
    objective: Objective,
    config: Config,
    initial: StartingModel,
    model: list[torch.nn.Module],
    weights: Path | None,
    samplers: list[Sampler],
    world: World,
) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, Any]]:
    """Log-probabilities of every response under policy and reference, float64 [responses] per
    data set, and the weights and the anchor of several references."""
    adapter = initial.load(model)
    parts = objective.parts
    mixed: dict[str, Any] = {}
    if objective.reference == "precomputed":
        datasets = [sampler.dataset for sampler in samplers]
        fingerprint = reference_fingerprint(model, adapter)
        reference = open_reference(
            objective, config, initial, fingerprint, datasets, world, valid=datasets
        )
        ref_logps = [x for x in map(reference.score, samplers) if x is not None]
        mixed = {"weights": reference.weights(0), "anchor": reference.anchor}
    else:
        ref_parts = ScoreParts(heads=parts.heads)
        with as_reference(model, initial.lora):
            ref_logps = [score_dataset(model, x, world, parts=ref_parts) for x in samplers]
        is_same = initial.lora is None or initial.lora.starts_as_reference
        if weights is None and not parts.alignments and is_same:
            return ref_logps, ref_logps, {}
    if weights is not None:
        state = initial.load_trained(weights, model, adapter)
        saved = state.get("references")
        mixed["running_rewards"] = state.get("running_rewards") or (0.0, 0.0)
        if objective.mixture is not None and objective.mixture.is_learned:
            mixed["weights"] = reference.saved_weights(saved, str(weights))
    return [score_dataset(model, x, world, parts=parts) for x in samplers], ref_logps, mixed


def preference_metrics(
    objective: Objective,
    dataset: PreferenceDataset,
    scores: np.ndarray,
    ref_logps: np.ndarray | None,
    block_size: int = EVALUATION_GROUPS,
    *,
    weights: np.ndarray | None = None,
    anchor: int = 0,
    running_rewards: Sequence[float] = (0.0, 0.0),
    kl_logratios: np.ndarray | None = None,
    subsets: Sequence[str] | None = None,
) -> dict[str, float]:
    """The loss of the whole data set as one step, and the means of the objective's metrics. An
    objective that looks at the whole step sees `block_size` consecutive groups at a time.

    `scores` and `ref_logps` are as `score_dataset` returns them for the objective's parts, the
    reference's without alignments; None if there is no reference. Of several references they are
    [K, …], with the `weights` [K] that they have and the one of them that is the `anchor`.
    `running_rewards` are those of the run that trained the policy; evaluation adds nothing to them.
    `kl_logratios` [groups] are as `mismatch_logratios` returns them; `subsets` [P] are names.
    """
    inputs = dataset_inputs(objective, dataset, scores, ref_logps, weights, anchor)
    running = torch.tensor(running_rewards, dtype=torch.float64)
    inputs = replace(inputs, running_rewards=running)
    if objective.needs_blocks:
        loss, sums = block_loss(objective, inputs, dataset, block_size, kl_logratios)
    else:
        loss, sums = objective.loss(inputs)
    extremes = objective.extremes(inputs).items()
    metrics = {
        "loss": float(loss),
        **objective.logged({name: (float(x), float(n)) for name, (x, n) in sums.items()}),
        **{name: -float(x) if name.endswith("/min") else float(x) for name, x in extremes},
        "num_pairs": len(inputs.pairs),
    }
    # KTO has no loss of a whole data set: its z is a block's.
    accuracies = objective.accuracies(inputs) if kl_logratios is None else None
    if accuracies is not None:
        metrics |= accuracies_of_kinds(inputs, accuracies)
    if subsets is not None:
        metrics |= accuracies_of_subsets(subsets, accuracies, objective.name)
    return metrics | ({"groups_per_block": block_size} if objective.needs_blocks else {})


def mismatch_logratios(
    sampler: Sampler, scores: np.ndarray, ref_logps: np.ndarray | None
) -> np.ndarray:
    """The log-ratio of the mismatch of each group, float64 [groups]; NaN for a group without one.

    `sampler` is a `mismatch_sampler`; `scores` and `ref_logps` are of its data set.
    """
    assert ref_logps is not None, "an objective with mismatches has a reference"
    logratios = np.full(len(sampler.dataset), np.nan)
    logratios[np.diff(sampler.dataset.group_responses) > 0] = scores - ref_logps
    return logratios


def block_loss(
    objective: Objective,
    inputs: LossInputs,
    dataset: PreferenceDataset,
    block_size: int,
    kl_logratios: np.ndarray | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and sums of a data set in blocks of `block_size` groups, each of which the objective
    sees as one step; the last may be smaller. The mean is over all of the data set."""
    denominators = inputs.denominators()
    total, sums = torch.zeros((), dtype=torch.float64), dict[str, torch.Tensor]()
    for start in range(0, len(dataset), block_size):
        stop = min(start + block_size, len(dataset))
        responses = slice(*(int(dataset.group_responses[g]) for g in (start, stop)))
        pairs = slice(*(int(dataset.group_pairs[g]) for g in (start, stop)))
        part = inputs.part(responses, pairs)
        if kl_logratios is not None:
            known = kl_logratios[start:stop]
            known = known[~np.isnan(known)]
            kl = max(0.0, float(known.mean())) if len(known) else 0.0
            part = replace(part, kl=torch.tensor(kl, dtype=torch.float64))
        loss, own = objective.loss(part, denominators)
        total += loss
        for name, values in own.items():
            sums[name] = sums.get(name, torch.zeros_like(values)) + values
    return total, sums


def dataset_inputs(
    objective: Objective,
    dataset: PreferenceDataset,
    scores: np.ndarray,
    ref_logps: np.ndarray | None,
    weights: np.ndarray | None = None,
    anchor: int = 0,
) -> LossInputs:
    """A whole data set as one table; see `preference_metrics`."""
    num_responses = len(dataset.response_lengths)
    own, heads, alignments = objective.parts.split(scores, num_responses)
    if heads is not None and dataset.pair_numbers is not None:
        heads = heads[dataset.pair_numbers]
    columns = StepColumns.of_dataset(dataset, objective.weighting)
    return LossInputs.of_arrays(
        columns.arrays(),
        scores=torch.from_numpy(own),
        **_of_references(objective, dataset, ref_logps, weights, anchor),
        heads=_tensor(heads),
        **_of_attributes(objective, dataset, scores),
        alignments=_tensor(alignments),
    )


def _of_references(
    objective: Objective,
    dataset: PreferenceDataset,
    ref_logps: np.ndarray | None,
    weights: np.ndarray | None,
    anchor: int,
) -> dict[str, Any]:
    """The columns of the table that are of one reference or several."""
    if ref_logps is None:
        return {"ref_logps": None}
    parts, num_responses = ScoreParts(heads=objective.parts.heads), len(dataset.response_lengths)
    logps, heads = [], []
    for vector in np.atleast_2d(ref_logps):
        own, own_heads, _ = parts.split(vector, num_responses)
        logps.append(own)
        if own_heads is not None:
            numbers = dataset.pair_numbers
            heads.append(own_heads if numbers is None else own_heads[numbers])
    logps_KR = torch.from_numpy(np.stack(logps))
    heads_KP2 = torch.from_numpy(np.stack(heads)) if heads else None
    columns: dict[str, Any] = {"ref_logps": logps_KR[anchor]}
    if heads_KP2 is not None:
        columns["ref_heads"] = heads_KP2[anchor]
    if objective.mixture is not None:
        columns["references"] = ReferenceColumns(
            logps=logps_KR, weights=_tensor(weights), anchor=anchor, heads=heads_KP2
        )
    return columns


def _of_attributes(
    objective: Objective, dataset: PreferenceDataset, scores: np.ndarray
) -> dict[str, Any]:
    """The columns of the table that are of several attributes."""
    own = objective.parts.attribute_scores(scores, len(dataset.response_lengths))
    if own is None:
        return {}
    return {
        "attribute_scores": torch.from_numpy(own),
        "attributes": torch.from_numpy(np.array(dataset.response_attributes)),
        "attribute_names": dataset.attribute_names,
    }


def _tensor(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)


def response_records(
    dataset: PreferenceDataset,
    scores: np.ndarray,
    name: str,
    set_name: str = "",
    attribute_scores: np.ndarray | None = None,
) -> Iterator[str]:
    """A JSON line per response: its data set if that has a name, group, response, record, its
    score under the key `name`, num_tokens (the response's own), and `attributes`: its score for
    each, if there are several ([R, A])."""
    own = dataset.own_tokens
    for group in range(len(dataset)):
        start, end = (int(x) for x in dataset.group_responses[group : group + 2])
        for index in range(start, end):
            record: dict[str, Any] = {"set": set_name} if set_name else {}
            record |= {
                "group": group,
                "response": index - start,
                "record": int(dataset.group_records[group]),
                name: None if np.isnan(scores[index]) else float(scores[index]),
                "num_tokens": int(own[index]),
            }
            if attribute_scores is not None:
                values = attribute_scores[index].tolist()
                record["attributes"] = dict(zip(dataset.attribute_names, values, strict=True))
            yield json.dumps(record)


def _write_records(
    path: str,
    datasets: Mapping[str, PreferenceDataset],
    scores: list[np.ndarray],
    parts: ScoreParts,
    key: str,
) -> None:
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            for (name, dataset), vector in zip(datasets.items(), scores, strict=True):
                num_responses = len(dataset.response_lengths)
                own = parts.split(vector, num_responses)[0]
                of_attributes = parts.attribute_scores(vector, num_responses)
                lines = response_records(dataset, own, key, name, of_attributes)
                file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise InputError(f"--per-response {path}: {error.strerror}") from None
