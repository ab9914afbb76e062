"""Evaluation: log-probabilities or rewards of a data set's responses -> loss, margins, accuracy.

Everything past them is a plain function of arrays over the data set's pairs,
so it does not depend on rows or ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_prefix.checkpoint.save_load import load_weights, resolve_checkpoint
from megatron_prefix.checkpoint.starting_model import initial_model
from megatron_prefix.config.schema import Config
from megatron_prefix.data.steps.rows import loss_weights
from megatron_prefix.data.steps.sampler import Sampler
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.distributed.session import running
from megatron_prefix.distributed.world import World
from megatron_prefix.engine.optimizer import build_model
from megatron_prefix.errors import InputError
from megatron_prefix.objectives.objective import LOGP_METRICS, pair_rewards
from megatron_prefix.reference.fingerprint import model_fingerprint
from megatron_prefix.reference.reference import freeze, score_dataset
from megatron_prefix.reference.sidecars import read_sidecar
from megatron_prefix.train.samplers import check_margins, evaluation_sampler, open_verified

PER_RESPONSE = {"lm": "logp", "reward": "reward"}
"""Key of a response's score in `--per-response`, by the kind of the model."""


def evaluate(config: Config, load: str | None, per_response: str | None) -> dict[str, float]:
    """Score `data.valid` with the policy and the reference, and return the metrics.

    The policy is the checkpoint `load`, or the initial model; `per_response` names a file for
    every response's log-probability under the policy. A reward model is evaluated alone, and the
    file gets its rewards. Raises InputError.
    """
    if config.data.valid is None:
        raise InputError("data.valid is not set: name the data set to evaluate on")
    if load is not None:
        load = resolve_checkpoint(load)
    if per_response is not None and not Path(per_response).absolute().parent.is_dir():
        raise InputError(f"--per-response {per_response}: no such directory; make it first")
    with running(config) as here:
        dataset = open_verified(config.data.valid, "data.valid", here)
        initial = initial_model(config.model, [dataset])
        sampler = evaluation_sampler(config, dataset, here, initial.sizes)
        model = freeze(
            build_model(initial.transformer_config(config.train.seed, config.parallel), here)
        )
        check_margins(config.loss, dataset, "data.valid")
        score = _rewards if config.loss.reference == "none" else _logps
        scores, ref_logps = score(config, initial, model, load, sampler, here)
        if per_response is not None:
            name = PER_RESPONSE[config.model.kind]
            here.once(lambda: _write_records(per_response, dataset, scores, name))
    return preference_metrics(dataset, scores, ref_logps, config)


def _rewards(config, initial, model, load, sampler: Sampler, here: World) -> tuple:
    """A reward model's score of every response, float64 [responses]; there is no reference."""
    if load is not None:
        load_weights(load, model)
    else:
        initial.load(model)
        if here.is_main and (note := initial.note(config.train.seed)) is not None:
            print(note, file=sys.stderr)
    return score_dataset(model, sampler, config.loss, here), None


def _logps(config, initial, model, load, sampler: Sampler, here: World) -> tuple:
    """Log-probabilities of every response under policy and reference, float64 [responses]."""
    initial.load(model)
    dataset = sampler.dataset
    logps = ref_logps = None
    if config.loss.reference == "precomputed":
        ref_logps = read_sidecar(config.loss.ref_logps, model_fingerprint(model), dataset)
    if ref_logps is None or load is None:
        logps = score_dataset(model, sampler, config.loss, here)
        ref_logps = logps if ref_logps is None else ref_logps
    if load is not None:
        load_weights(load, model)
        logps = score_dataset(model, sampler, config.loss, here)
    return logps, ref_logps


def pair_responses(dataset: PreferenceDataset) -> np.ndarray:
    """(chosen, rejected) of every pair, numbered through the whole data set, [P, 2]."""
    pairs_per_group = np.diff(dataset.group_pairs)
    first = np.repeat(np.asarray(dataset.group_responses[:-1]), pairs_per_group)
    return np.asarray(dataset.pair_responses, np.int64) + first[:, None]


def preference_metrics(
    dataset: PreferenceDataset, scores: np.ndarray, ref_logps: np.ndarray | None, config: Config
) -> dict[str, float]:
    """Weighted mean loss, and means over pairs of rewards, margins and accuracy.

    `scores` and `ref_logps` are float64 [responses], as `score_dataset` returns them; a reward
    model has no reference.
    """
    pairs = pair_responses(dataset)
    weighting = config.loss.weighting
    weights = np.concatenate([loss_weights(dataset, g, weighting) for g in range(len(dataset))])
    result = pair_rewards(
        config.loss,
        torch.from_numpy(scores),
        None if ref_logps is None else torch.from_numpy(ref_logps),
        torch.from_numpy(pairs),
        torch.from_numpy(np.array(dataset.pair_margins)),
    )
    sides = scores[pairs[:, 0]].mean(), scores[pairs[:, 1]].mean()
    logps = dict(zip(LOGP_METRICS, map(float, sides), strict=True))
    return {
        "loss": float(np.average(result.losses.numpy(), weights=weights)),
        "rewards/chosen": float(result.chosen.mean()),
        "rewards/rejected": float(result.rejected.mean()),
        "rewards/margins": float(result.margins.mean()),
        "rewards/accuracies": float(result.accuracies.mean()),
        **(logps if ref_logps is not None else {}),
        "num_pairs": len(pairs),
    }


def response_records(dataset: PreferenceDataset, scores: np.ndarray, name: str) -> Iterator[str]:
    """A JSON line a response: group, response, record, its score under `name`, num_tokens (the
    response's own)."""
    own = np.asarray(dataset.response_lengths) - np.asarray(dataset.response_prompts)
    for group in range(len(dataset)):
        start, end = (int(x) for x in dataset.group_responses[group : group + 2])
        for index in range(start, end):
            record = {
                "group": group,
                "response": index - start,
                "record": int(dataset.group_records[group]),
                name: None if np.isnan(scores[index]) else float(scores[index]),
                "num_tokens": int(own[index]),
            }
            yield json.dumps(record)


def _write_records(path: str, dataset: PreferenceDataset, scores: np.ndarray, name: str) -> None:
    lines = "".join(line + "\n" for line in response_records(dataset, scores, name))
    try:
        Path(path).write_text(lines, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--per-response {path}: {error.strerror}") from None
