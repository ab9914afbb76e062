"""From a configuration to a run that is ready for its next step."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_prefix.checkpoint import save_load as checkpoint
from megatron_prefix.checkpoint.starting_model import InitialModel, initial_model
from megatron_prefix.config.schema import Config, dump_config
from megatron_prefix.data.steps.packed.reading import PackedSteps
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.distributed.world import World
from megatron_prefix.engine.optimizer import build_model, build_optimizer
from megatron_prefix.errors import InputError
from megatron_prefix.reference.fingerprint import model_fingerprint
from megatron_prefix.reference.reference import (
    ModelReference,
    NoReference,
    PrecomputedReference,
    Reference,
    freeze,
)
from megatron_prefix.reference.sidecars import read_sidecar
from megatron_prefix.trackers.jsonl import MetricsWriter, Progress
from megatron_prefix.train.samplers import check_margins, evaluation_sampler, training_sampler
from megatron_prefix.train.steps_report import describe_steps
from megatron_prefix.train.trainer import Run

ROUNDING = {"float32": 2.0**-20, "bfloat16": 2.0**-8}
"""Relative difference of a response's log-probability between two ways to compute it."""


def prepare_run(
    config: Config,
    dataset: PreferenceDataset,
    valid: PreferenceDataset | None,
    here: World,
    plan: PackedSteps | None = None,
) -> Run:
    """A run up to its next step, resumed where `train.load` has a checkpoint; collective.

    Raises InputError where the parts do not fit.
    """
    here.beat("preparation")
    _check_outputs(config, here)
    _check_valid(dataset, valid)
    check_margins(config.loss, dataset, "data.train")
    if valid is not None:
        check_margins(config.loss, valid, "data.valid")
    initial = initial_model(config.model, [dataset] if valid is None else [dataset, valid])
    sampler = training_sampler(config, dataset, here, plan, initial.sizes)
    num_steps = config.train.steps or sampler.composition.num_steps(config.train.epochs)
    if config.optimizer.lr_warmup_steps >= num_steps:
        raise InputError(
            f"optimizer.lr_warmup_steps = {config.optimizer.lr_warmup_steps} does not end "
            f"within the run's {num_steps} steps: shorten it"
        )
    if here.is_main:
        print(describe_steps(sampler, num_steps), flush=True)
    model_config = initial.transformer_config(config.train.seed, config.parallel)
    chunks = build_model(model_config, here)
    here.beat("the initial weights")
    initial.load(chunks)
    fingerprint = model_fingerprint(chunks) if config.loss.reference != "none" else None
    reference = _reference(config, initial, fingerprint, dataset, valid, here)
    policy, optimizer, scheduler = build_optimizer(
        chunks, model_config, config.optimizer, config.parallel, num_steps
    )
    identity = run_identity(config, dataset, fingerprint)
    step = _latest(config, here)
    if step:
        here.beat(f"loading the checkpoint of step {step}")
        checkpoint.load_checkpoint(config.train.load, step, policy, optimizer, scheduler, identity)
    _say_start(config, initial, step, here)
    opened: list[MetricsWriter] = []  # on the main process
    here.once(lambda: opened.append(_open_metrics(config, step)))
    return Run(
        config=config,
        world=here,
        initial=initial,
        sampler=sampler,
        valid=None if valid is None else evaluation_sampler(config, valid, here, initial.sizes),
        reference=reference,
        policy=policy,
        optimizer=optimizer,
        scheduler=scheduler,
        num_steps=num_steps,
        step=step,
        identity=identity,
        metrics=opened[0] if opened else None,
        progress=Progress(num_steps, step, shown=here.is_main),
    )


def run_identity(config: Config, dataset: PreferenceDataset, fingerprint: str | None) -> dict:
    """What decides the order of the data and the rewards: a resumed run must agree with it.

    `fingerprint` is the reference model's, None where there is none.
    """
    data = config.data
    identity = {
        "data.train fingerprint": dataset.fingerprint,
        "data.seed": data.seed,
        "data.global_batch_size": data.global_batch_size,
        "data.rows_per_step": data.rows_per_step,
        "train.epochs": config.train.epochs,
    }
    if fingerprint is not None:
        identity["reference model fingerprint"] = fingerprint
    if data.rows_per_step:
        identity |= {"data.sharing": data.sharing, "data.row_capacity": data.row_capacity}
        if data.packing_method != "first-fit":
            identity["data.packing_method"] = data.packing_method
    if data.sort_by_length:
        identity["data.sort_by_length"] = True
    return identity


def _reference(
    config: Config,
    initial: InitialModel,
    fingerprint: str | None,
    dataset: PreferenceDataset,
    valid: PreferenceDataset | None,
    here: World,
) -> Reference:
    if config.loss.reference == "none":
        return NoReference()
    rounding = ROUNDING[config.model.dtype]
    if config.loss.reference == "precomputed":
        sets = [dataset] + ([valid] if valid is not None else [])
        path = config.loss.ref_logps
        logps = {d.fingerprint: read_sidecar(path, fingerprint, d) for d in sets}
        return PrecomputedReference(fingerprint, dataset, logps, rounding)
    chunks = freeze(
        build_model(initial.transformer_config(config.train.seed, config.parallel), here)
    )
    initial.load(chunks)
    # Policy and reference run the same rows, which float32 computes alike.
    rounding = 0.0 if config.model.dtype == "float32" else rounding
    return ModelReference(fingerprint, chunks, config.loss, here, rounding)


def _check_valid(dataset: PreferenceDataset, valid: PreferenceDataset | None) -> None:
    if valid is None:
        return
    ours, theirs = (d.manifest["tokenizer"] for d in (dataset, valid))
    if ours["fingerprint"] != theirs["fingerprint"]:
        raise InputError(
            f"data.valid was built with tokenizer {theirs['name']} ({theirs['vocab_size']} "
            f"entries, {theirs['fingerprint'][:16]}…), data.train with {ours['name']} "
            f"({ours['vocab_size']} entries, {ours['fingerprint'][:16]}…): build both with one"
        )


def _check_outputs(config: Config, here: World) -> None:
    """Directories can be written, and a fresh run does not fall upon another's checkpoints."""

    def check() -> None:
        train = config.train
        _probe("logging.output", config.logging.output)
        if train.save is None:
            return
        _probe("train.save", train.save)
        checkpoint.clear_leftovers(train.save)
        is_same = (
            train.load is not None and Path(train.load).resolve() == Path(train.save).resolve()
        )
        if checkpoint.latest_step(train.save) is not None and not is_same:
            raise InputError(
                f"train.save = {train.save} holds the checkpoints of a run already: go on with "
                f"train.load: {train.save}, or name another directory"
            )

    here.once(check)


def _probe(setting: str, directory: str) -> None:
    probe = Path(directory) / f".write-{os.getpid()}"
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{setting} = {directory}: {error.strerror}; name a directory that can be written"
        ) from None


def _latest(config: Config, here: World) -> int:
    load = config.train.load
    if load is None:
        return 0
    if (Path(load) / checkpoint.COMPLETE).exists():
        raise InputError(
            f"train.load = {load} is one checkpoint: give the directory above it, whose "
            f"{checkpoint.TRACKER} says which one to resume from"
        )
    return here.once(lambda: checkpoint.latest_step(load) or 0)


def _say_start(config: Config, initial: InitialModel, step: int, here: World) -> None:
    load, note = config.train.load, initial.note(config.train.seed)
    if here.is_main and note is not None and not step:
        print(note, flush=True)
    if here.is_main and load is not None:
        text = (
            f"resumed from {load} after step {step}"
            if step
            else f"no checkpoint in {load}: starting afresh"
        )
        print(text, flush=True)


def _open_metrics(config: Config, step: int) -> MetricsWriter:
    """A new run's directory, or the same one from `step` on."""
    logging = config.logging
    try:
        writer = MetricsWriter(
            logging.output, resumed_step=step or None, tensorboard=logging.tensorboard
        )
        (Path(logging.output) / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"logging.output = {logging.output}: {error}; name a directory that can be written"
        ) from None
    return writer
