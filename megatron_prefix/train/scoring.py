"""Scoring with the reference: data sets in, a sidecar out (see sidecar.py)."""

from __future__ import annotations

from pathlib import Path

from megatron_prefix.checkpoint.starting_model import initial_model
from megatron_prefix.config.schema import Config
from megatron_prefix.distributed.session import open_session
from megatron_prefix.distributed.world import World
from megatron_prefix.engine.optimizer import build_model
from megatron_prefix.errors import InputError
from megatron_prefix.reference.fingerprint import model_fingerprint
from megatron_prefix.reference.reference import freeze, score_dataset
from megatron_prefix.reference.sidecars import PartialScores, write_sidecar
from megatron_prefix.train.samplers import evaluation_sampler, open_verified


def score_reference(config: Config, output: str) -> None:
    """Write the sidecar `output` for `data.train` and, where it is set, `data.valid`.

    What is done is kept beside `output` while it runs. Raises InputError.
    """
    if config.loss.reference == "none":
        raise InputError(
            "score computes a reference's log-probabilities, and a reward model (model.kind: "
            "reward) has no reference: use evaluate --per-response for its rewards"
        )
    if not Path(output).absolute().parent.is_dir():
        raise InputError(f"--output {output}: no such directory; make it first")
    with open_session(config) as here:
        settings = {"data.train": config.data.train, "data.valid": config.data.valid}
        datasets = {
            dataset.fingerprint: dataset
            for setting, prefix in settings.items()
            if prefix is not None
            for dataset in [open_verified(prefix, setting, here)]
        }
        initial = initial_model(config.model, list(datasets.values()))
        model = freeze(
            build_model(initial.transformer_config(config.train.seed, config.parallel), here)
        )
        initial.load(model)
        fingerprint = model_fingerprint(model)
        scores = []
        for dataset in datasets.values():
            sampler = evaluation_sampler(config, dataset, here, initial.sizes)
            key = {"model": fingerprint, "data": dataset.fingerprint} | _rows(config, here)
            partial = PartialScores(
                output, dataset.fingerprint[:16], key, len(dataset.response_lengths)
            )
            if here.is_main and partial.step:
                print(f"{dataset.prefix}: going on after step {partial.step}", flush=True)
            logps = score_dataset(model, sampler, config.loss, here, partial)
            scores.append((dataset, logps))
            if here.is_main:
                print(f"{dataset.prefix}: {len(logps):,} responses scored", flush=True)
        here.once(lambda: write_sidecar(output, fingerprint, scores))
        if here.is_main:
            partial.discard()
            print(f"wrote {output} (reference model {fingerprint[:16]}…)")


def _rows(config: Config, here: World) -> dict:
    """What decides which rows a step of scoring has."""
    data = config.data
    return {
        "sharing": data.sharing,
        "packing": data.packing,
        "row_capacity": data.row_capacity,
        "micro_batch_size": data.micro_batch_size,
        "global_batch_size": data.global_batch_size,
        "ranks": here.data_size,
    }
