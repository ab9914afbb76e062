"""Setup: from a configuration to a trainer that is ready for its next step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prefix.checkpoint import (
    RunCheckpoints,
    SavedAdapter,
    StartingModel,
    resolve_starting_model,
)
from megatron_prefix.config import Config
from megatron_prefix.config.lora import LoraConfig
from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.steps.packed import PackedSteps
from megatron_prefix.data.store import PreferenceDataset, check_one_vocabulary
from megatron_prefix.distributed import World
from megatron_prefix.engine import Policy, build_model, build_policy
from megatron_prefix.errors import InputError
from megatron_prefix.model import TreeTransformerConfig
from megatron_prefix.objectives import Objective, check
from megatron_prefix.reference import Reference, open_reference, reference_fingerprint
from megatron_prefix.trackers import Trackers, configured_trackers
from megatron_prefix.train.data_checks import (
    check_columns,
    refuse_unused_reference,
)
from megatron_prefix.train.identity import run_identity, run_schedule, vision_identity
from megatron_prefix.train.machine_notes import machine_notes, transformer_engine_version
from megatron_prefix.train.profiling import check_window
from megatron_prefix.train.row_costs import ModelCosts
from megatron_prefix.train.samplers import (
    evaluation_sampler,
    joint_sampler,
    mismatch_sampler,
    training_sampler,
    valid_setting,
)
from megatron_prefix.train.samples import Samples
from megatron_prefix.train.steps_report import describe_steps, large_batch_note
from megatron_prefix.train.trainer import Trainer


def prepare_trainer(
    config: Config,
    dataset: PreferenceDataset,
    valid: Mapping[str, PreferenceDataset] | None,
    world: World,
    plan: PackedSteps | None = None,
) -> Trainer:
    """A trainer before its next step, resumed if `train.load` has a checkpoint; collective.

    `valid` are the held-out data sets by name. The directories of `make_outputs` should belong to
    this run. Raises InputError if the parts do not fit.
    """
    world.beat("preparation")
    make_outputs(config, world)
    _claim_checkpoints(config, world)
    valid = valid or {}
    datasets = [dataset, *valid.values()]
    check_one_vocabulary(datasets)
    objective = checked_objective(config, dataset, valid)
    parts = [part for data in datasets for part in data.parts]
    initial = resolve_starting_model(config.model, parts, config.lora)
    model_config = initial.transformer_config(config.train.seed, config.parallel)
    costs = ModelCosts(initial, model_config.vision)
    sampler = training_sampler(config, objective, dataset, world, plan, costs)
    mismatches = mismatch_sampler(config, objective, sampler, "data.train", world, costs)
    joint = joint_sampler(config, objective, sampler, world, costs)
    valid_samplers, valid_mismatches = _held_out_samplers(config, objective, valid, world, costs)
    num_steps = run_steps(config, sampler)
    _print_steps(config, sampler, num_steps, dataset, world)
    samples = Samples.of_run(config, dataset, world)
    chunks = build_model(model_config, world)
    world.beat("the initial weights")
    adapter = initial.load(chunks)
    fingerprint = None if objective.reference == "none" else reference_fingerprint(chunks, adapter)
    reference = open_reference(
        objective,
        config,
        initial,
        fingerprint,
        datasets,
        world,
        policy=chunks,
        sampler=sampler,
        valid=[held_out.dataset for held_out in valid_samplers.values()],
        has_own_rows=joint is not None,
    )
    if not reference.starts_policy:
        _print_unknown_start(config, world)
    policy = build_policy(chunks, model_config, config, num_steps)
    if config.train.save:
        policy.refuse_idle_ranks(world)
    identity = run_identity(config, objective, dataset, fingerprint) | reference.identity
    identity |= vision_identity(model_config)
    schedule = run_schedule(config, num_steps)
    step, changes, saved = _resumed(config, policy, reference, identity, schedule, adapter, world)
    _print_start(config, initial, model_config, step, changes, world)
    trackers = _started_trackers(_resolved(config, objective, initial.lora), num_steps, step, world)
    if samples is not None:
        samples.open(step)
    return Trainer(
        config=config,
        objective=objective,
        world=world,
        initial=initial,
        sampler=sampler,
        valid=valid_samplers,
        mismatches=mismatches,
        joint=joint,
        valid_mismatches=valid_mismatches,
        reference=reference,
        policy=policy,
        num_steps=num_steps,
        step=step,
        identity=identity,
        schedule=schedule,
        adapter=adapter,
        running_rewards=tuple(saved.get("running_rewards") or (0.0, 0.0)),
        trackers=trackers,
        samples=samples,
    )


def _started_trackers(config: Config, num_steps: int, step: int, world: World) -> Trackers:
    """The trackers of a run at `step`; collective. Only the main process has any."""
    trackers = configured_trackers(config, num_steps) if world.is_main else Trackers()
    world.once(lambda: trackers.start(config, step))
    return trackers


def run_steps(config: Config, sampler: Sampler) -> int:
    """The steps of the run, which its learning rate's schedule fits. Raises InputError."""
    num_steps = config.train.steps
    if num_steps is None:
        assert config.train.epochs is not None  # one of them is given
        num_steps = sampler.composition.num_steps(config.train.epochs)
    for fault in config.optimizer.run_faults(num_steps):
        raise InputError(fault)
    check_window(config, num_steps)
    return num_steps


def checked_objective(
    config: Config, dataset: PreferenceDataset, valid: Mapping[str, PreferenceDataset]
) -> Objective:
    """The objective, of whose needs no data set lacks any. Raises InputError."""
    objective = check(config.loss, config.model.kind, num_labels=config.model.num_labels)
    check_columns(objective, dataset, "data.train", is_trained_on=True)
    for name, held_out in valid.items():
        check_columns(objective, held_out, valid_setting(name))
    refuse_unused_reference(config, objective)
    return objective


def _held_out_samplers(
    config: Config,
    objective: Objective,
    valid: Mapping[str, PreferenceDataset],
    world: World,
    costs: ModelCosts,
) -> tuple[dict[str, Sampler], dict[str, Sampler]]:
    """Samplers of the held-out data sets, and of their mismatches if the objective needs them."""
    samplers, mismatches = dict[str, Sampler](), dict[str, Sampler]()
    for name, dataset in valid.items():
        own = evaluation_sampler(config, objective, dataset, world, costs)
        others = mismatch_sampler(config, objective, own, valid_setting(name), world, costs)
        samplers[name] = own
        if others is not None:
            mismatches[name] = others
    return samplers, mismatches


def _resumed(
    config: Config,
    policy: Policy,
    reference: Reference,
    identity: dict[str, Any],
    schedule: dict[str, Any],
    adapter: SavedAdapter | None,
    world: World,
) -> tuple[int, list[str], dict[str, Any]]:
    """The step of the checkpoint in `train.load`, now in `policy`, what has changed since, and the
    state of its objective; step 0 if there is none. Raises InputError if it is of another run."""
    saved: dict[str, Any] = {}
    if config.train.load is None:
        return 0, [], saved
    checkpoints = RunCheckpoints(config.train.load)
    step = checkpoints.whole_step_to_resume(world.once, config.train.load_fallback)
    if not step:
        return 0, [], saved

    def restore(state: dict[str, Any]) -> None:
        saved.update(state)
        reference.check_state(state.get("references"), step)

    world.beat(f"loading the checkpoint of step {step}")
    changes = checkpoints.load(
        step,
        policy.chunks,
        policy.optimizer,
        policy.scheduler,
        identity,
        schedule,
        restore,
        adapter,
    )
    return step, changes, saved


def _resolved(config: Config, objective: Objective, lora: LoraConfig | None) -> Config:
    """`config` with every setting that the objective uses written out, and the resolved `lora`."""
    options = {name: x for name, x in objective.options.items() if x is not False}
    weighting = objective.weighting if objective.weighs_pairs else None
    if objective.mixture is not None:
        options |= objective.mixture.settings()
    loss = replace(config.loss, **options, reference=objective.reference, weighting=weighting)
    return replace(config, loss=loss, lora=lora)


def make_outputs(config: Config, world: World) -> dict[str, str]:
    """The directories that a run writes, made and tested; their paths by setting. Collective.

    Raises InputError if one cannot be written.
    """
    outputs = {"logging.output": config.logging.output}
    if config.train.save is not None:
        outputs["train.save"] = config.train.save

    def make() -> None:
        for setting, directory in outputs.items():
            _probe(setting, directory)

    world.once(make)
    return outputs


def _claim_checkpoints(config: Config, world: World) -> None:
    """A new run does not overwrite the checkpoints of another."""
    train = config.train
    if train.save is not None:
        checkpoints = RunCheckpoints(train.save)
        world.once(lambda: checkpoints.claim(train.load))


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


def _print_steps(
    config: Config, sampler: Sampler, num_steps: int, dataset: PreferenceDataset, world: World
) -> None:
    if not world.is_main:
        return
    print(describe_steps(sampler, num_steps), flush=True)
    if (note := large_batch_note(config, len(dataset))) is not None:
        print(note, flush=True)


def _print_unknown_start(config: Config, world: World) -> None:
    if world.is_main:
        print(
            f"the anchor {config.loss.reference_anchor} is not the policy's initial model: the "
            "first step has no known loss and is not checked",
            flush=True,
        )


def _print_start(
    config: Config,
    initial: StartingModel,
    model_config: TreeTransformerConfig,
    step: int,
    changes: list[str],
    world: World,
) -> None:
    if not world.is_main:
        return
    is_on_cuda = world.device.type == "cuda"
    for line in machine_notes(model_config, is_on_cuda, transformer_engine_version()):
        print(line, flush=True)
    load, note = config.train.load, initial.note(config.train.seed)
    if note is not None and not step:
        print(note, flush=True)
    if load is not None:
        text = (
            f"resumed from {load} after step {step}"
            if step
            else f"no checkpoint in {load}: starting from scratch"
        )
        print("; ".join([text, *changes]), flush=True)
