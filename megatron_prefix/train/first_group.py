"""First-step check without a reference: one group scored alone.

There is no first value to compare the loss with. So the first group of a run is scored with every
response alone in its row, before the first step, and must have the log-probabilities that the rows
of the step give it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.data.steps.alone import AloneSteps
from megatron_prefix.distributed import World
from megatron_prefix.engine import Feed, Policy
from megatron_prefix.engine.shadow import AloneTable
from megatron_prefix.errors import RunError
from megatron_prefix.model import unwrap
from megatron_prefix.objectives import Objective, ScoreParts
from megatron_prefix.train.findings import budgets_of, names_of, worst_score
from megatron_prefix.train.rounding import rounding_of


@dataclass(frozen=True, eq=False)
class FirstGroup:
    """The first group of the first step, every response alone."""

    alone: AloneTable
    scores: Tensor
    budgets: Tensor
    objective: Objective
    sampler: Sampler
    world: World

    @classmethod
    def scored(
        cls, policy: Policy, objective: Objective, sampler: Sampler, world: World
    ) -> FirstGroup:
        """Score it. Collective; call it before the gradients of the step are computed: with
        overlapping gathers, weights are gathered in the first forward pass after an update."""
        steps = AloneSteps(sampler=sampler, most_groups=1)
        parts = ScoreParts(attribute=objective.parts.attribute)
        config = unwrap(policy.chunks[0]).config
        with closing(Feed(steps, world, config, 1, parts)) as feed:
            alone = AloneTable.of(steps, feed.step(0), world.data_rank, parts)
        scores, noise = alone.scores(policy.chunks, world)
        budgets = budgets_of(alone.table, noise, rounding_of(config))
        return cls(alone, scores, budgets, objective, sampler, world)

    def check(self, rows: list[MicroBatch], scores: list[Tensor]) -> None:
        """Raise RunError unless this step's `rows` have the same scores, to rounding; collective.
        `scores` are what `response_scores` gave for each row."""
        name = names_of(self.objective.model, self.sampler.dataset)
        alone = self.alone.table, self.scores, self.budgets
        own = worst_score("score", name, rows, scores, *alone, 1)
        findings = [finding for part in self.world.gather([*own]) for finding in part]
        if findings and (worst := max(findings)).share > 1:
            raise RunError(
                f"the first group of the run was also scored with every response alone in its row, "
                f"and {worst}. So the rows of the run are not what they should be. Try "
                "model.attention_backend: dense to see whether attention is the cause"
            )
