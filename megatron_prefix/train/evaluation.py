"""Evaluation: scores of a data set's responses -> loss, rewards, accuracy.

Only the scores come from rows and ranks; the metrics are a plain function of arrays over the data
set's pairs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prefix.checkpoint import (
    StartingModel,
    load_weights,
    resolve_checkpoint,
    resolve_starting_model,
)
from megatron_prefix.config import Config
from megatron_prefix.data.steps import Sampler, loss_weights
from megatron_prefix.data.store import PreferenceDataset, check_one_vocabulary
from megatron_prefix.distributed import World, open_session
from megatron_prefix.errors import InputError
from megatron_prefix.objectives import LossInputs, Objective, check
from megatron_prefix.reference import (
    PrecomputedReference,
    frozen_model,
    model_fingerprint,
    score_dataset,
)
from megatron_prefix.train.samplers import (
    check_columns,
    evaluation_sampler,
    open_valid_sets,
    valid_setting,
)

PER_RESPONSE = {"lm": "logp", "reward": "reward"}
"""Key of a response's score in `--per-response`, by `model.kind`."""


def evaluate(config: Config, load: str | None, per_response: str | None) -> dict[str, float]:
    """Score `data.valid` with the policy and the reference, and return the metrics.

    If `data.valid` names several data sets, the metrics of NAME have keys `NAME/…`. The policy is
    the checkpoint `load`, or the initial model. `per_response` names a file for every response's
    log-probability under the policy, or its reward. Raises InputError.
    """
    objective = check(config.loss, config.model.kind)
    if config.data.valid is None:
        raise InputError("data.valid is not set: name the data set to evaluate on")
    weights = None if load is None else resolve_checkpoint(load)
    if per_response is not None and not Path(per_response).absolute().parent.is_dir():
        raise InputError(f"--per-response {per_response}: no such directory; make it first")
    with open_session(config) as world:
        datasets = open_valid_sets(config, world)
        check_one_vocabulary([*datasets.values()])
        initial = resolve_starting_model(config.model, [*datasets.values()])
        samplers = [
            evaluation_sampler(config, objective, dataset, world, initial.sizes)
            for dataset in datasets.values()
        ]
        model = frozen_model(initial.transformer_config(config.train.seed, config.parallel), world)
        for name, dataset in datasets.items():
            check_columns(objective, dataset, valid_setting(name))
        if objective.reference == "none":
            scores = _own_scores(config, initial, model, weights, samplers, world)
            ref_logps: Sequence[np.ndarray | None] = [None] * len(samplers)
        else:
            scores, ref_logps = _logps(objective, config, initial, model, weights, samplers, world)
        if per_response is not None:
            key = PER_RESPONSE[config.model.kind]
            world.once(lambda: _write_records(per_response, datasets, scores, key))
    metrics: dict[str, float] = {}
    for (name, dataset), own, reference in zip(datasets.items(), scores, ref_logps, strict=True):
        prefix = f"{name}/" if name else ""
        values = preference_metrics(objective, dataset, own, reference)
        metrics |= {f"{prefix}{key}": value for key, value in values.items()}
    return metrics


def _own_scores(
    config: Config,
    initial: StartingModel,
    model: list[torch.nn.Module],
    weights: Path | None,
    samplers: list[Sampler],
    world: World,
) -> list[np.ndarray]:
    """The model's score of every response, float64 [responses] per data set, without a
    reference."""
    if weights is not None:
        load_weights(weights, model)
    else:
        initial.load(model)
        if world.is_main and (note := initial.note(config.train.seed)) is not None:
            print(note, file=sys.stderr)
    return [score_dataset(model, sampler, world) for sampler in samplers]


def _logps(
    objective: Objective,
    config: Config,
    initial: StartingModel,
    model: list[torch.nn.Module],
    weights: Path | None,
    samplers: list[Sampler],
    world: World,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probabilities of every response under policy and reference, float64 [responses] per
    data set."""
    initial.load(model)
    if objective.reference == "precomputed":
        path = config.loss.ref_logps
        assert path is not None
        fingerprint, datasets = model_fingerprint(model), [s.dataset for s in samplers]
        reference = PrecomputedReference.read(path, fingerprint, datasets, rounding=0.0)
        ref_logps = [reference.score(sampler) for sampler in samplers]
    else:
        ref_logps = [score_dataset(model, sampler, world) for sampler in samplers]
        if weights is None:
            return ref_logps, ref_logps
    if weights is not None:
        load_weights(weights, model)
    return [score_dataset(model, sampler, world) for sampler in samplers], ref_logps


def pair_responses(dataset: PreferenceDataset) -> np.ndarray:
    """(chosen, rejected) of every pair as indices among all responses of the data set, [P, 2].

    Groups of 2 and 3 responses, with pairs [(0, 1)] and [(0, 2), (1, 2)] of their own, start at
    response 0 and 2: [(0, 1), (2, 4), (3, 4)].
    """
    pairs_per_group = np.diff(dataset.group_pairs)
    first = np.repeat(np.asarray(dataset.group_responses[:-1]), pairs_per_group)
    return np.asarray(dataset.pair_responses, np.int64) + first[:, None]


def preference_metrics(
    objective: Objective,
    dataset: PreferenceDataset,
    scores: np.ndarray,
    ref_logps: np.ndarray | None,
) -> dict[str, float]:
    """Weighted mean loss, and means over pairs of the objective's metrics.

    `scores` and `ref_logps` are float64 [responses], as `score_dataset` returns them; None if there
    is no reference.
    """
    pairs = pair_responses(dataset)
    weights = np.concatenate(
        [loss_weights(dataset, g, objective.weighting) for g in range(len(dataset))]
    )
    inputs = LossInputs(
        scores=torch.from_numpy(scores),
        ref_logps=None if ref_logps is None else torch.from_numpy(ref_logps),
        num_tokens=torch.from_numpy(own_tokens(dataset)),
        pairs=torch.from_numpy(pairs),
        margins=torch.from_numpy(np.array(dataset.pair_margins)),
    )
    outputs = objective.outputs(inputs)
    return {
        "loss": float(np.average(outputs.losses.numpy(), weights=weights)),
        **{name: float(x.mean()) for name, x in outputs.metrics.items()},
        # NumPy sums in another order than torch; it has always been NumPy for these.
        **{name: float(x.numpy().mean()) for name, x in objective.logp_metrics(inputs).items()},
        "num_pairs": len(pairs),
    }


def own_tokens(dataset: PreferenceDataset) -> np.ndarray:
    """Tokens with loss of every response: its own, without its prompt, int64 [responses]."""
    lengths = np.asarray(dataset.response_lengths, np.int64)
    return lengths - np.asarray(dataset.response_prompts, np.int64)


def response_records(
    dataset: PreferenceDataset, scores: np.ndarray, name: str, set_name: str = ""
) -> Iterator[str]:
    """A JSON line per response: its data set if that has a name, group, response, record, its
    score under the key `name`, num_tokens (the response's own)."""
    own = own_tokens(dataset)
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
            yield json.dumps(record)


def _write_records(
    path: str, datasets: Mapping[str, PreferenceDataset], scores: list[np.ndarray], key: str
) -> None:
    try:
        with Path(path).open("w", encoding="utf-8") as file:
            for (name, dataset), own in zip(datasets.items(), scores, strict=True):
                file.writelines(f"{line}\n" for line in response_records(dataset, own, key, name))
    except OSError as error:
        raise InputError(f"--per-response {path}: {error.strerror}") from None
