"""Scoring with the reference: data sets in, a sidecar out (see reference/sidecars.py)."""

from __future__ import annotations

from pathlib import Path

from megatron_prefix.checkpoint import resolve_starting_model
from megatron_prefix.config import Config
from megatron_prefix.data.store import check_one_vocabulary
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
from megatron_prefix.train.data_checks import refuse_unused_reference
from megatron_prefix.train.samplers import (
    evaluation_sampler,
    open_training_set,
    open_valid_sets,
)


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
        train, valid = open_training_set(config, world), open_valid_sets(config, world)
        check_one_vocabulary([train, *valid.values()])
        datasets = {
            part.fingerprint: part for data in (train, *valid.values()) for part in data.parts
        }
        initial = resolve_starting_model(config.model, list(datasets.values()), config.lora)
        refuse_unused_reference(config, objective)
        model = frozen_model(initial.transformer_config(config.train.seed, config.parallel), world)
        adapter = initial.load(model)
        fingerprint = reference_fingerprint(model, adapter)
        parts = ScoreParts(heads=objective.parts.heads)
        scores, heads = [], []
        for dataset in datasets.values():
            sampler = evaluation_sampler(
                config, objective, dataset, world, initial.sizes, is_scoring=True
            )
            key = {"model": fingerprint, "data": dataset.fingerprint} | _rows(config, world)
            num_responses = len(dataset.response_lengths)
            num_heads = 2 * len(dataset.pair_weights) if parts.heads else 0
            partial = PartialScores(
                output, dataset.fingerprint[:16], key, num_responses + num_heads
            )
            if world.is_main and partial.step:
                print(f"{dataset.prefix}: continuing after step {partial.step}", flush=True)
            with as_reference(model, initial.lora):
                vector = score_dataset(model, sampler, world, partial, parts=parts)
            logps, own, _ = parts.split(vector, num_responses)
            scores.append((dataset, logps))
            heads += [] if own is None else [own]
            if world.is_main:
                print(f"{dataset.prefix}: {len(logps):,} responses scored", flush=True)
        world.once(lambda: write_sidecar(output, fingerprint, scores, heads or None))
        if world.is_main:
            partial.discard()
            print(f"wrote {output} (reference model {fingerprint[:16]}…)")


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
