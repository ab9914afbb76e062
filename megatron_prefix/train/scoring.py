"""Scoring with the reference: data sets in, a sidecar out (see reference/sidecars.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_prefix.checkpoint import resolve_starting_model
from megatron_prefix.config import Config
from megatron_prefix.data.store import PreferenceDataset, check_one_vocabulary
from megatron_prefix.data.store.roles import mismatched_responses
from megatron_prefix.distributed import World, open_session
from megatron_prefix.errors import InputError
from megatron_prefix.model.adapters import as_reference
from megatron_prefix.objectives import ScoreParts, check
from megatron_prefix.reference import (
    PartialScores,
    frozen_model,
    reference_fingerprint,
    score_dataset,
    write_sidecar,
)
from megatron_prefix.text import counted, duration
from megatron_prefix.train.row_costs import ModelCosts
from megatron_prefix.train.samplers import (
    evaluation_sampler,
    open_plan,
    open_training_set,
    open_valid_sets,
    training_sampler,
)
from megatron_prefix.train.setup import checked_objective, run_steps

PROGRESS_S = 10.0
"""Seconds between two lines of progress."""


def score_reference(config: Config, output: str) -> None:
    """Write the sidecar `output` for all data sets of `data.train` and, if set, `data.valid`.

    Scores so far are saved beside `output` while it runs. Raises InputError.
    """
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    if objective.reference == "none":
        raise InputError(
            f"loss.loss_type = {objective.name} (model.kind: {config.model.kind}) has no "
            "reference, and score computes a reference's log-probabilities: use evaluate "
            "--per-response for the model's own scores"
        )
    if not Path(output).absolute().parent.is_dir():
        raise InputError(f"--output {output}: no such directory; make it first")
    with open_session(config) as world:
        needs_pairs = objective.needs_pairs
        train = open_training_set(config, world, needs_pairs=needs_pairs)
        valid = open_valid_sets(config, world, needs_pairs=needs_pairs)
        check_one_vocabulary([train, *valid.values()])
        # all that `train` would refuse about the same file, before the work and not after it
        plan = open_plan(config, world)
        checked_objective(config, train, valid)
        run_steps(config, training_sampler(config, objective, train, world, plan))
        datasets = {
            part.fingerprint: part for data in (train, *valid.values()) for part in data.parts
        }
        initial = resolve_starting_model(config.model, list(datasets.values()), config.lora)
        model = frozen_model(initial.transformer_config(config.train.seed, config.parallel), world)
        adapter = initial.load(model)
        fingerprint = reference_fingerprint(model, adapter)
        parts, costs = ScoreParts(heads=objective.parts.heads), ModelCosts(initial)
        scores, heads = [], []
        for dataset in datasets.values():
            key = {"model": fingerprint, "data": dataset.fingerprint} | _rows(config, world)
            logps = np.full(len(dataset.stored.response_lengths), np.nan)
            for view, name, sharing in _views(dataset):
                sampler = evaluation_sampler(
                    config, objective, view, world, costs, is_scoring=True, sharing=sharing
                )
                own_parts = parts if sharing is None else ScoreParts()
                num_responses = len(view.response_lengths)
                num_heads = 2 * len(view.pair_weights) if own_parts.heads else 0
                partial = PartialScores(output, name, key, num_responses + num_heads)
                if world.is_main and partial.step:
                    print(f"{dataset.prefix}: continuing after step {partial.step}", flush=True)
                with as_reference(model, initial.lora):
                    vector = score_dataset(
                        model, sampler, world, partial, own_parts, _progress(dataset.prefix, world)
                    )
                numbers = view.response_numbers
                own, own_heads, _ = own_parts.split(vector, num_responses)
                logps[slice(None) if numbers is None else numbers] = own
                heads += [] if own_heads is None else [own_heads]
            scores.append((dataset.stored, logps))
            if world.is_main:
                print(f"{dataset.prefix}: {counted(len(logps), 'response')} scored", flush=True)
        world.once(lambda: write_sidecar(output, fingerprint, scores, heads or None))
        if world.is_main:
            partial.discard()
            print(f"wrote {output} (reference model {fingerprint[:16]}…)")


def _progress(name: Path | str, world: World) -> Callable[[int, int], None] | None:
    """Prints on the main process how far scoring of the data set `name` is: a line for the first
    step, and one every PROGRESS_S seconds."""
    if not world.is_main:
        return None
    start = last = time.monotonic()
    first: int | None = None

    def tell(done: int, num_steps: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        if first is None or now - last >= PROGRESS_S:
            last = now
            text = f"{name}: step {done}/{num_steps}"
            if first is not None:
                left = (now - start) / (done - first + 1) * (num_steps - done)
                text += f"  left {duration(left)}"
            print(text, flush=True)
        first = done if first is None else first

    return tell


def _views(dataset: PreferenceDataset) -> list[tuple[PreferenceDataset, str, str | None]]:
    """The own responses of a data set, and its mismatches if it has some; each with the name of its
    partial scores, and the sharing mode that it needs."""
    name = dataset.fingerprint[:16]
    views: list[tuple[PreferenceDataset, str, str | None]] = [(dataset, name, None)]
    if (mismatches := mismatched_responses(dataset)) is not None:
        views.append((mismatches, f"{name}-mismatches", "response"))
    return views


def _rows(config: Config, world: World) -> dict:
    """The settings that decide which rows a step of scoring has."""
    data = config.data
    return {
        "sharing": data.sharing,
        "packing": data.packing,
        "row_capacity": data.row_capacity,
        "micro_batch_size": data.micro_batch_size,
        "global_batch_size": data.global_batch_size,
        "ranks": world.data_size,
        **({"oversized": "split"} if data.oversized == "split" else {}),
    }
