"""The shadow run: the first steps of a run, computed a second time with every response alone.

Before the update of such a step, its groups run again with nothing shared and nothing packed: one
response per row, with its whole prompt. Log-probabilities, loss and gradients of both runs must be
equal to rounding, so a user's own model, data and layout prove themselves before they cost money.
The run goes on from the first gradients, as if the second run had not been.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.config import Config
from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.data.steps.alone import AloneSteps
from megatron_prefix.distributed import World
from megatron_prefix.engine import Feed, Policy, TrainBatch
from megatron_prefix.engine.shadow import (
    AloneTable,
    HostGradients,
    TableLoss,
    TableReference,
    kept_random_state,
)
from megatron_prefix.errors import RunError
from megatron_prefix.model import unwrap
from megatron_prefix.objectives import Objective, ScoreParts
from megatron_prefix.reference import Reference
from megatron_prefix.text import align
from megatron_prefix.train.findings import Finding, budgets_of, names_of, worst_score
from megatron_prefix.train.mismatches import MismatchPass, mean_kl
from megatron_prefix.train.rounding import BEND, DEVIATIONS, TOLERANCE, rounding_of

FLOOR = 0.01
"""Of the norm of all gradients: a parameter's gradient is compared with its own norm and this."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstRun:
    """A step as the run itself computed it: what is compared, on this rank."""

    rows: list[MicroBatch]
    batches: list[TrainBatch]
    """The rows as their gradients were computed, which are in the policy."""
    scores: list[Tensor]
    """What `response_scores` gave for each row."""
    loss: float
    """Of the step."""
    running_rewards: tuple[float, float]
    """Sum and number of the rewards of the steps before."""
    mismatches: MismatchPass | None
    """None if the objective needs none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AloneLoss:
    """The loss of the second run, as a function of the scores of its table."""

    alone: AloneTable
    objective: Objective
    reference: TableReference
    running_rewards: tuple[float, float]
    kl: Tensor | None
    kl_budget: float
    """By how much `kl` may differ."""

    def at(self, scores: Tensor, kl_change: float = 0.0) -> TableLoss:
        kl = None if self.kl is None else (self.kl + kl_change).clamp(min=0)
        return self.alone.loss(self.objective, scores, self.reference, self.running_rewards, kl)

    def changes(self, scores: Tensor, budgets: Tensor) -> tuple[float, float]:
        """What changes if every value of the table is off by its budget, in the directions that
        raise and lower the loss: the loss, and its slopes as a share of their norm."""
        table = self.at(scores)
        signs = table.slopes.sign()
        alone = self.alone.table
        num_alignments = alone.columns.num_entries if alone.parts.alignments else 0
        signs[len(signs) - num_alignments :] = 1.0  # they have no slopes, but weigh pairs
        directions = [signs, -signs]
        if self.objective.needs_running:  # the mean of all rewards has no slopes either
            directions += [torch.ones_like(signs), -torch.ones_like(signs)]
        kl_changes = (0.0,) if self.kl is None else (self.kl_budget, -self.kl_budget)
        loss_change = slope_change = 0.0
        for direction in directions:
            for kl_change in kl_changes:
                moved = self.at(scores + direction * budgets, kl_change)
                loss_change = max(loss_change, abs(float(moved.logs["loss"] - table.logs["loss"])))
                norm = table.slopes.norm().clamp(min=1e-300)
                slope_change = max(slope_change, float((moved.slopes - table.slopes).norm() / norm))
        return BEND * loss_change, BEND * slope_change


class ShadowRun:
    """The second run of the first `num_steps` steps of a run."""

    def __init__(
        self,
        *,
        config: Config,
        objective: Objective,
        world: World,
        sampler: Sampler,
        mismatches: Sampler | None,
        reference: Reference,
        policy: Policy,
        num_steps: int,
    ) -> None:
        """`mismatches` is the sampler of what the objective needs beside `sampler`'s groups."""
        self._objective, self._world = objective, world
        self._reference, self._policy = reference, policy
        self._has_auxiliary = config.model.moe_aux_loss_coeff > 0
        self.num_steps = num_steps
        self._steps = AloneSteps(sampler=sampler)
        model_config = unwrap(policy.chunks[0]).config
        self._num_layers = model_config.num_layers
        self._rounding = rounding_of(model_config)
        self._feed = Feed(self._steps, world, model_config, num_steps, objective.parts)
        self._mismatches, self._mismatch_feed = None, None
        if mismatches is not None:
            self._mismatches = AloneSteps(sampler=mismatches)
            self._mismatch_feed = Feed(self._mismatches, world, model_config, num_steps)
        self._worst: dict[str, Finding] = {}

    def close(self) -> None:
        self._feed.close()
        if self._mismatch_feed is not None:
            self._mismatch_feed.close()

    def check(self, step: int, first: FirstRun) -> None:
        """Run step `step`, counted from 0, again and compare; collective.

        Raises RunError if both runs differ by more than rounding. Prints a report after the last
        of its steps.
        """
        world, policy = self._world, self._policy
        if not math.isfinite(policy.gradient_norm()):
            return  # the update stops the run and names the rows
        world.beat(f"the second run of step {step + 1}")
        gradients = HostGradients.copied(policy.chunks)
        with kept_random_state(world.device):
            own = [*self._compared(step, first, gradients)]
        gradients.restore(policy.chunks)
        reports = [finding for part in world.gather(own) for finding in part]
        for finding in reports:
            self._worst[finding.kind] = max(finding, self._worst.get(finding.kind, finding))
        worst = max(reports)
        if worst.share > 1:
            raise RunError(
                f"train.shadow_steps: step {step + 1} was computed again with every response "
                f"alone in its row, and it is not the same step: {worst}. {self._others(worst)}"
                "Try model.attention_backend: dense to see whether attention is the cause"
            )
        if step + 1 == self.num_steps and world.is_main:
            print(self._report(), flush=True)

    def _others(self, worst: Finding) -> str:
        others = [x for x in self._worst.values() if x.share > 1 and x.kind != worst.kind]
        return "".join(f"Also {other}. " for other in sorted(others, reverse=True))

    def _report(self) -> str:
        """What was compared, and the largest differences."""
        table = [["  largest difference of", "", "rounding allows", "in step"]]
        for finding in self._worst.values():
            numbers = f"{finding.difference:.2e}", f"{finding.budget:.2e}", f"{finding.step}"
            table.append([f"  {finding.quantity}", *numbers])
        return "\n".join(
            [
                f"train.shadow_steps = {self.num_steps}: the first steps were computed again with "
                "every response alone in its row, and are the same to rounding",
                *align(table),
            ]
        )

    def _compared(self, step: int, first: FirstRun, gradients: HostGradients) -> Iterator[Finding]:
        """This rank's largest difference of each kind. Leaves other gradients in the policy."""
        world, policy, number = self._world, self._policy, step + 1
        if self._has_auxiliary:  # it depends on the rows, so both runs are compared without it
            batches = [batch.without_auxiliary() for batch in first.batches]
            policy.gradients(batches, self._objective)
            gradients = HostGradients.copied(policy.chunks)
        norm = policy.gradient_norm()
        prepared = self._feed.step(step)
        alone = AloneTable.of(self._steps, prepared, world.data_rank, self._objective.parts)
        own, noise = alone.scores(policy.chunks, world)
        budgets = budgets_of(alone.table, noise, self._rounding)
        name = names_of(self._objective.model, self._steps.dataset)
        compared = alone.table, own, budgets
        yield from worst_score("score", name, first.rows, first.scores, *compared, number)
        kl, kl_budget = None, 0.0
        if first.mismatches is not None:
            kl, kl_budget = yield from self._compared_kl(step, first.mismatches)
        second = AloneLoss(
            alone=alone,
            objective=self._objective,
            reference=self._reference_of(alone, self._steps, step),
            running_rewards=first.running_rewards,
            kl=kl,
            kl_budget=kl_budget,
        )
        table = second.at(own)
        loss_change, slope_change = second.changes(own, budgets)
        alone_loss = float(table.logs["loss"])
        budget = TOLERANCE * max(1.0, abs(alone_loss)) + loss_change
        yield Finding.of("loss", "loss", abs(first.loss - alone_loss), budget, number)

        policy.gradients(alone.sloped(table.slopes), self._objective)
        alone_norm = policy.gradient_norm()
        # every layer rounds a gradient, and it changes as the slopes do
        share = DEVIATIONS * self._rounding * math.sqrt(1 + self._num_layers) + slope_change
        difference = abs(norm - alone_norm)
        yield Finding.of("norm", "gradient norm", difference, share * alone_norm, number)
        parameters = [
            Finding.of(
                "gradient",
                f"gradient of {x.name}",
                x.norm,
                share * (x.norms[1] + FLOOR * alone_norm),
                number,
            )
            for x in gradients.differences(policy.chunks)
        ]
        yield from sorted(parameters)[-1:]  # a rank may own no part of any parameter

    def _compared_kl(
        self, step: int, first: MismatchPass
    ) -> Generator[Finding, None, tuple[Tensor, float]]:
        """The mismatches alone, compared; returns their KL, and by how much it may differ."""
        world, number = self._world, step + 1
        assert self._mismatches is not None and self._mismatch_feed is not None
        prepared = self._mismatch_feed.step(step)
        alone = AloneTable.of(self._mismatches, prepared, world.data_rank, ScoreParts())
        own, noise = alone.scores(self._policy.chunks, world)
        budgets = budgets_of(alone.table, noise, self._rounding)
        place = self._mismatches.dataset.place
        yield from worst_score(
            "mismatch",
            lambda group, _: f"log-probability of the mismatch of {place(group)}",
            first.rows,
            first.scores,
            alone.table,
            own,
            budgets,
            number,
        )
        reference = self._reference_of(alone, self._mismatches, step).values
        assert reference is not None, "a mismatch is compared with the reference"
        kl = mean_kl(own - reference)
        # under policy and reference
        budget = 2 * float(budgets.mean()) if len(budgets) else TOLERANCE
        difference = abs(float(first.kl - kl))
        yield Finding.of("kl", "KL of the mismatches", difference, budget, number)
        return kl, budget

    def _reference_of(self, alone: AloneTable, steps: AloneSteps, step: int) -> TableReference:
        """What the reference gives for each response alone."""
        reference = self._reference
        rows = reference.score_rows(alone.batches)
        if rows is not None:
            return alone.reference_of_rows(rows, self._world)
        scores = reference.score(steps.sampler)
        if scores is None:
            return TableReference()
        return alone.reference_of_data_set(scores, reference.weights(step), reference.anchor)
