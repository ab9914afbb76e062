"""The training loop: its steps, and when it evaluates, saves and stops.

Every step: rows of the plan -> reference log-probabilities -> forward and backward -> optimizer
-> one line of metrics. The first step of a new run with a reference has a known loss, which is
checked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch

from megatron_prefix.checkpoint import RunCheckpoints, SavedAdapter, StartingModel
from megatron_prefix.config import Config
from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.distributed import StopRequest, World
from megatron_prefix.engine import Feed, Policy, StepRows, TrainBatch
from megatron_prefix.errors import Stopped
from megatron_prefix.model import unwrap
from megatron_prefix.model.layers import step_auxiliary
from megatron_prefix.objectives import Objective
from megatron_prefix.reference import Reference
from megatron_prefix.trackers import Status, Trackers
from megatron_prefix.train.closing import stopped_message
from megatron_prefix.train.falling import FallingWatch
from megatron_prefix.train.first_group import FirstGroup
from megatron_prefix.train.first_step import (
    check_first_step,
    check_first_value,
    reward_start_note,
    value_of_scores,
)
from megatron_prefix.train.held_out import HeldOut
from megatron_prefix.train.mismatches import MismatchPass, MismatchSteps
from megatron_prefix.train.non_finite import describe, finite_rows, stop_non_finite
from megatron_prefix.train.pace import Pace
from megatron_prefix.train.profiling import StepProfiler
from megatron_prefix.train.rounding import ROUNDING
from megatron_prefix.train.samples import Samples
from megatron_prefix.train.shadow import FirstRun, ShadowRun
from megatron_prefix.train.totals import step_totals
from megatron_prefix.train.two_passes import check_passes, first_pass


@dataclass(kw_only=True, eq=False)
class Trainer:
    """The parts of one run; `step` counts the optimizer steps that are done."""

    config: Config
    objective: Objective
    world: World
    initial: StartingModel
    sampler: Sampler
    valid: Mapping[str, Sampler]
    """Held-out data sets by name; the name of a single one is ""."""
    mismatches: Sampler | None
    """The mismatches of the groups of `sampler`'s steps, if the objective needs them."""
    joint: Sampler | None
    """The same groups with own responses and mismatches, if the reference scores both at once."""
    valid_mismatches: Mapping[str, Sampler]
    """The mismatches of held-out data sets, if it does."""
    reference: Reference
    policy: Policy
    num_steps: int
    step: int
    identity: dict[str, Any]
    """Settings that a run resumed from this one must have, see identity.py."""
    schedule: dict[str, Any]
    """Settings that it may change."""
    adapter: SavedAdapter | None
    """What checkpoints say about the adapters, if the run has any."""
    trackers: Trackers
    samples: Samples | None = None
    """Sample answers of the policy, if the configuration asks for them."""
    falling: FallingWatch = field(default_factory=FallingWatch)
    running_rewards: tuple[float, float] = (0.0, 0.0)
    """Sum and number of the rewards of all steps so far, for objectives that need them."""
    evaluated: tuple[int, float | None] = (-1, None)
    """The step of the last evaluation, and its value of `train.keep_best`'s metric."""

    @cached_property
    def checkpoints(self) -> RunCheckpoints | None:
        """Where the run saves; None if it does not."""
        if self.config.train.save is None:
            return None
        return RunCheckpoints.of_run(self.config, self.world.host)

    @cached_property
    def feed(self) -> Feed:
        """The run's steps."""
        model_config = unwrap(self.policy.chunks[0]).config
        return Feed(
            self.sampler,
            self.world,
            model_config,
            self.num_steps,
            self.objective.parts,
            with_table=self.objective.needs_step,
        )

    @cached_property
    def profiler(self) -> StepProfiler:
        """Records the steps of `train.profile`."""
        return StepProfiler(self.config, self.step, self.world.is_main)

    @cached_property
    def pace(self) -> Pace:
        """How far and how fast the run is."""
        return Pace(self.config, self.sampler, self.num_steps)

    @cached_property
    def held_out(self) -> HeldOut:
        """The held-out data sets, and how the policy scored them last."""
        return HeldOut(
            config=self.config,
            objective=self.objective,
            world=self.world,
            reference=self.reference,
            policy=self.policy,
            samplers=self.valid,
            mismatches=self.valid_mismatches,
        )

    @property
    def checks_first_step(self) -> bool:
        """Whether policy and reference are the same model before the first step."""
        has_reference = self.objective.reference != "none"
        return has_reference and self.reference.starts_policy and not self.starts_elsewhere

    @property
    def starts_elsewhere(self) -> bool:
        """Whether policy and reference differ from the start, by the adapter that is loaded."""
        lora = self.initial.lora
        return self.objective.reference != "none" and not (lora is None or lora.starts_as_reference)

    @cached_property
    def mismatch_steps(self) -> MismatchSteps | None:
        """The mismatches of the run's steps, if the objective needs them."""
        if self.mismatches is None:
            return None
        return MismatchSteps(
            sampler=self.sampler,
            mismatches=self.mismatches,
            joint=self.joint,
            policy=self.policy,
            reference=self.reference,
            world=self.world,
            num_steps=self.num_steps,
        )

    @cached_property
    def shadow(self) -> ShadowRun | None:
        """The second run of the first steps, if `train.shadow_steps` asks for it and they are still
        to come."""
        num_steps = min(self.config.train.shadow_steps, self.num_steps)
        if self.step >= num_steps:
            return None
        return ShadowRun(
            config=self.config,
            objective=self.objective,
            world=self.world,
            sampler=self.sampler,
            mismatches=self.mismatches,
            reference=self.reference,
            policy=self.policy,
            num_steps=num_steps,
        )

    def run(self, stop: StopRequest | None = None) -> None:
        """Train from `step` to `num_steps`, or until a signal asks to stop. Raises Stopped then."""
        settings, _ = self.config.train, self.pace  # whose clock starts here
        samples_interval = None if settings.generate is None else settings.generate.every
        if self.step == 0:
            self.evaluate()
            self.write_samples()
        while self.step < self.num_steps:
            with self.profiler.recording(self.step + 1):
                values = self.train_step()
            self.trackers.log(self.step, values)
            if self.checkpoints is not None:
                self.checkpoints.check()  # of a save in the background
            is_last = self.step == self.num_steps
            is_asked = stop is not None and stop.is_asked()
            if is_last or _is_due(self.step, settings.eval_interval):
                self.evaluate()  # before saving, so that what is saved is complete
            if is_last or _is_due(self.step, samples_interval):
                self.write_samples()
            if is_last or is_asked or _is_due(self.step, settings.save_interval):
                self.save()
            if (is_asked or is_last) and self.checkpoints is not None:
                self.checkpoints.wait()
            if is_asked and not is_last:
                raise Stopped(stopped_message(self.config, self.step, self.world))

    def train_step(self) -> dict:
        """One optimizer step. Returns its metrics."""
        start = time.monotonic()
        self.world.beat(f"step {self.step + 1}")
        step = self.feed.step(self.step)
        plan, rows, batches, rank = step.plan, step.rows, step.batches, self.world.data_rank
        if self.config.model.moe_aux_loss_coeff:
            count = self._step_count(rows)
            batches = [batch.with_step_count(count) for batch in batches]
        batches, mismatches = self._with_reference(rows, batches)
        is_first = self.step == 0 and self.checks_first_step
        if is_first and self.reference.rounding:
            batches = [batch.with_scales() for batch in batches]
        first_group = None if is_first else self._first_group()
        value = None
        if self.step == 0 and self.starts_elsewhere and step.table is None:
            value = value_of_scores(self.policy.chunks, batches, self.objective, self.world)
        running_rewards = self.running_rewards
        logs, checks, batches, more = self._passes(step, batches, is_first)
        scores = [log["scores"] for log in checks]
        means, counts = step_totals(plan, rows, logs, self.sampler, self.objective, self.world)
        means |= more
        if self.config.model.moe_aux_loss_coeff:
            means["moe/aux_loss"] = step_auxiliary(self.policy.chunks, self.world.device)
        if not np.isfinite(list(means.values())).all():
            is_finite = finite_rows(logs) if step.table is None else [True] * len(rows)
            self._stop_non_finite("loss", rows, batches, describe(rank, rows, is_finite))
        if self.step == 0 and self.starts_elsewhere:
            # with a table the loss is already that of a forward pass alone (two_passes.py)
            value = means["loss"] if value is None else value
            check_first_value(means["loss"], value, self.objective, self.world)
        elif is_first:
            check_first_step(means["loss"], checks, self.objective, self.reference, self.world)
        if self.step == 0 and self.initial.draws_rewards and self.world.is_main:
            if (note := reward_start_note(means.get("rewards/mean", 0.0))) is not None:
                print(note, flush=True)
        if first_group is not None:
            first_group.check(rows, scores)
        if self.shadow is not None and self.step < self.shadow.num_steps:
            first_run = FirstRun(
                rows=rows,
                batches=batches,
                scores=scores,
                loss=means["loss"],
                running_rewards=running_rewards,
                mismatches=mismatches,
            )
            self.shadow.check(self.step, first_run)
        update = self.policy.update()
        if update is None:
            is_finite = self._finite_gradients(batches)
            self._stop_non_finite("gradient", rows, batches, describe(rank, rows, is_finite))
        grad_norm, learning_rate = update
        self.step += 1
        warning = self.falling.warning(self.step, means)
        if warning is not None and self.world.is_main:
            print(warning, flush=True)
        counts = {"num_pairs": plan.num_pairs, **counts}
        return {
            **means,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            **counts,
            **self.pace.values(self.step, time.monotonic() - start, counts, sum(plan.costs)),
        }

    def evaluate(self) -> None:
        """Score the held-out sets, write an evaluation line, and keep its value for `save`."""
        if not self.valid:
            return
        values = self.held_out.metrics(self.step, self.running_rewards)
        if self.checkpoints is not None:
            self.evaluated = (self.step, self.checkpoints.value(values))
        self.trackers.log(self.step, values)

    def write_samples(self) -> None:
        """Write sample answers of the policy, if `train.generate` asks for them."""
        if self.samples is not None:
            self.samples.write(self.step, self.policy)

    def save(self) -> None:
        """Write a checkpoint of this step to `train.save`, if that is set."""
        if self.checkpoints is None:
            return
        self.world.beat(f"the save of step {self.step}")
        self.policy.finish_param_gather()
        step, value = self.evaluated
        self.checkpoints.save(
            self.step,
            self.policy.chunks,
            self.policy.optimizer,
            self.policy.scheduler,
            self.identity,
            self.schedule,
            attach=self.initial.attach,
            value=value if step == self.step else None,
            objective_state={
                "references": self.reference.state(self.step),
                "running_rewards": list(self.running_rewards),
            },
            adapter=self.adapter,
        )

    def close(self, status: Status = "done", ends_at_once: bool = False) -> None:
        """Stop the feeds and finish the trackers: the run ended with `status`. A save that is in
        flight is waited for, unless the process `ends_at_once`."""
        if self.checkpoints is not None:
            self.checkpoints.close(ends_at_once)
        self.profiler.close()
        self.feed.close()
        if self.mismatch_steps is not None:
            self.mismatch_steps.close()
        if self.shadow is not None:
            self.shadow.close()
        self.trackers.finish(status)

    def _first_group(self) -> FirstGroup | None:
        """The first group of the run, alone, if nothing else checks the first step."""
        if self.step or self.shadow is not None:
            return None
        return FirstGroup.scored(self.policy, self.objective, self.sampler, self.world)

    def _gradients(self, batches: list[TrainBatch], is_first: bool = False) -> list[dict]:
        """Forward and backward over rows, from zero gradients. Returns the rows' logs."""
        return self.policy.gradients(batches, self.objective, is_first)

    def _with_reference(
        self, rows: list[MicroBatch], batches: list[TrainBatch]
    ) -> tuple[list[TrainBatch], MismatchPass | None]:
        """A step's rows with their reference, and what a pass over the step's mismatches gives if
        the objective needs it."""
        if self.mismatch_steps is None:
            return self.reference.attach(rows, batches, self.step), None
        batches, mismatches = self.mismatch_steps.attach(self.step, rows, batches)
        if mismatches.not_finite:
            self._stop_non_finite("loss", rows, batches, mismatches.not_finite)
        return batches, mismatches

    def _passes(
        self, step: StepRows, batches: list[TrainBatch], is_first: bool
    ) -> tuple[list[dict], list[dict], list[TrainBatch], dict[str, float]]:
        """Forward and backward over a step. Returns logs for `step_totals`, those for
        `check_first_step`, the rows as their gradients were computed, and further metrics."""
        if step.table is None:
            logs = self._gradients(batches, is_first)
            return logs, logs, batches, {}
        first = first_pass(
            self.policy.chunks,
            step,
            batches,
            self.objective,
            self.world,
            running_rewards=self.running_rewards,
            is_first=is_first,
        )
        if first.not_finite:
            self._stop_non_finite("loss", step.rows, batches, first.not_finite)
        self.running_rewards = first.running_rewards
        rows = self._gradients(first.batches, is_first)
        rounding = ROUNDING[self.config.model.dtype]
        difference = check_passes(
            step.rows, first.scores, [row["scores"] for row in rows], rounding, self.world
        )
        checks = [row | start for row, start in zip(rows, first.starts, strict=True)]
        return first.logs, checks, first.batches, {"logps/pass_difference": difference}

    def _step_count(self, rows: list[MicroBatch]) -> float:
        """What the auxiliary loss of experts is divided by: the step's tokens, counted as
        `model.moe_count` sets it."""
        model = self.config.model
        served = np.concatenate([row.served for row in rows])
        counts = served if model.moe_count == "responses" else served > 0
        return float(self.world.sum(torch.tensor(int(counts.sum()), device=self.world.device)))

    def _finite_gradients(self, batches: list[TrainBatch]) -> list[bool]:
        """Whether each row alone has finite gradients; other ranks run their own row with it.

        Interleaved pipeline stages cannot run one row, so with them every row counts as finite.
        """
        if self.config.parallel.virtual_pipeline_model_parallel_size is not None:
            return [True] * len(batches)
        is_finite = []
        for batch in batches:
            self._gradients([batch])
            is_finite.append(bool(np.isfinite(self.policy.gradient_norm())))
        return is_finite

    def _stop_non_finite(
        self,
        quantity: str,
        rows: list[MicroBatch],
        batches: list[TrainBatch],
        causes: list[str],
    ) -> NoReturn:
        output = self.config.logging.output
        stop_non_finite(quantity, self.step + 1, rows, batches, causes, output, self.world)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
