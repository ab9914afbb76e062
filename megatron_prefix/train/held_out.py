"""Held-out data during training: its metrics, and the pairs that the policy gets most wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_prefix.config import Config
from megatron_prefix.data.steps import Sampler
from megatron_prefix.distributed import World
from megatron_prefix.engine import Policy
from megatron_prefix.errors import RunError
from megatron_prefix.objectives import Objective
from megatron_prefix.reference import Reference, score_dataset
from megatron_prefix.train.evaluation import mismatch_logratios, preference_metrics
from megatron_prefix.train.examples import worst_pairs
from megatron_prefix.train.samplers import evaluation_block


@dataclass(kw_only=True, eq=False)
class HeldOut:
    """The held-out data sets of a run, by name; the reference scores each of them once."""

    config: Config
    objective: Objective
    world: World
    reference: Reference
    policy: Policy
    samplers: Mapping[str, Sampler]
    mismatches: Mapping[str, Sampler]
    """Their mismatches, if the objective needs them."""
    ref_logps: dict[str, np.ndarray | None] = field(default_factory=dict)
    last_scores: dict[str, np.ndarray] = field(default_factory=dict)
    """The policy's scores of every response in the last evaluation, by data set."""

    def metrics(self, step: int, running_rewards: tuple[float, float]) -> dict[str, float]:
        """The metrics of all sets after `step` steps: `eval_KEY`, or `eval_NAME/KEY` of a set with
        a name. Collective. Raises RunError if one is not finite."""
        values: dict[str, float] = {}
        for name, sampler in self.samplers.items():
            self.world.beat(f"the evaluation after step {step}")
            prefix = f"eval_{name}/" if name else "eval_"
            own = self._metrics_of(name, sampler, step, running_rewards)
            values |= {f"{prefix}{key}": value for key, value in own.items()}
        return values

    def worst_pairs(self) -> list[dict[str, Any]]:
        """The pairs whose margin is worst in the last evaluation."""
        pairs: list[dict[str, Any]] = []
        for name, scores in self.last_scores.items():
            dataset, ref_logps = self.samplers[name].dataset, self.ref_logps[name]
            if ref_logps is not None:
                own = ref_logps if ref_logps.ndim == 1 else ref_logps[self.reference.anchor]
                ref_logps = own[: len(scores)]
            pairs += worst_pairs(dataset, scores, ref_logps, name)
        return pairs

    def _metrics_of(
        self, name: str, sampler: Sampler, step: int, running_rewards: tuple[float, float]
    ) -> dict[str, float]:
        """Those of one set."""
        if name not in self.ref_logps:
            self.ref_logps[name] = self.reference.score(sampler)
        parts = self.objective.parts
        scores = score_dataset(self.policy.chunks, sampler, self.world, parts=parts)
        metrics = preference_metrics(
            self.objective,
            sampler.dataset,
            scores,
            self.ref_logps[name],
            evaluation_block(self.config),
            weights=self.reference.weights(step),
            anchor=self.reference.anchor,
            running_rewards=running_rewards,
            kl_logratios=self._kl_logratios(name),
        )
        if not np.isfinite(list(metrics.values())).all():
            raise RunError(
                f"the evaluation after step {step} is not finite (loss {metrics['loss']}): "
                "the weights have diverged. Lower optimizer.lr, and resume from a checkpoint"
            )
        self.last_scores[name] = parts.split(scores, len(sampler.dataset.response_lengths))[0]
        return metrics

    def _kl_logratios(self, name: str) -> np.ndarray | None:
        """The log-ratio of each group's mismatch, if the objective needs them."""
        sampler, key = self.mismatches.get(name), f"{name}/mismatches"
        if sampler is None:
            return None
        if key not in self.ref_logps:
            self.ref_logps[key] = self.reference.score(sampler)
        own = score_dataset(self.policy.chunks, sampler, self.world)
        return mismatch_logratios(sampler, own, self.ref_logps[key])
