"""Objective: what a run minimises, one or several records with their options.

Shapes: R responses, P pairs, S comparison sets.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from megatron_prefix.objectives.member import Member
from megatron_prefix.objectives.record import LossOutputs, Unit, logged_values
from megatron_prefix.objectives.reference_mixtures import ReferenceMixture
from megatron_prefix.objectives.table import LossInputs, ScoreParts
from megatron_prefix.objectives.watching import length_moments, log_ratios, with_correlation

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 1e-6
"""Nats."""
Denominators = Mapping[str, "float | Tensor"]
"""What the loss of each unit is divided by."""
Sums = dict[str, "Tensor"]
"""Name of a metric -> [2]: its sum and its count. The metric of a step is the sum over rows and
ranks of the one over that of the other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The weighted sum of its members' means."""

    name: str
    """The loss types as the configuration has them, joined by +."""
    members: tuple[Member, ...]
    reference: Literal["model", "precomputed", "none"]
    weighting: Literal["pair", "group"]
    """What a pair weighs; of no effect without members that have pairs."""
    comparisons: Literal["all", "best_vs_rest", "best_vs_worst", "adjacent"] = "all"
    """Which pairs of a comparison set enter."""
    ld_alpha: float | None = None
    """What multiplies the log-probability of the tokens by which the longer side of a pair exceeds
    the shorter one; None: they count whole. Park et al. 2024 (LD-DPO, arXiv 2409.06411), equation
    10, with TRL's name."""
    use_weighting: bool = False
    """A pair's loss is multiplied by exp of the sum over both sides of the mean over tokens of
    logp - log(sum over the vocabulary of p^2), without gradient. Zhou et al. 2024 (WPO, arXiv
    2406.11827), equation 4; not bounded by 1 as in the authors' code, but as in TRL. The
    denominator stays the sum of the pairs' own weights."""
    mixture: ReferenceMixture | None = None
    """How several references become one; None if there is one or none."""
    num_labels: int = 1
    """Scores that a reward model gives each response."""
    attribute: int = 0
    """Of several scores, the one that rewards and pairs are about."""
    is_list: bool = False
    """Whether the configuration gives a list of loss types."""

    @property
    def model(self) -> Literal["lm", "reward"]:
        """The `model.kind` that it trains."""
        return self.members[0].record.model

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of the data: names of `LossInputs`."""
        return tuple(dict.fromkeys(x for member in self.members for x in member.columns))

    @property
    def needs_sets(self) -> bool:
        """Whether it needs all responses of a comparison set in one row, and not only pairs."""
        return any(member.unit in ("set", "response", "label") for member in self.members)

    @property
    def parts(self) -> ScoreParts:
        """What it needs of a model beside the score of each response."""
        return ScoreParts(
            heads=self.ld_alpha is not None,
            alignments=self.use_weighting,
            num_labels=self.num_labels,
            attribute=self.attribute,
        )

    @property
    def needs_step(self) -> bool:
        """Whether it needs all responses of a step at once."""
        return any(member.record.scope == "step" for member in self.members)

    @property
    def needs_pairs(self) -> bool:
        """Whether a data set without pairs has nothing to learn from."""
        return any(member.unit not in ("response", "label") for member in self.members)

    @property
    def weighs_pairs(self) -> bool:
        """Whether the weights of pairs are all that is in its denominators."""
        return all(member.unit in ("pair", "token") for member in self.members)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options that have an effect, by name, without those of which two members have other
        values."""
        values: dict[str, list[Any]] = {}
        needs: dict[str, tuple[str, Any] | None] = {}
        for member in self.members:
            for name, option in member.record.options.items():
                values.setdefault(name, []).append(member.options[name])
                needs[name] = option.needs
        agreed = {name: x[0] for name, x in values.items() if all(y == x[0] for y in x)}
        return {
            name: value
            for name, value in agreed.items()
            if (need := needs[name]) is None or agreed.get(need[0]) == need[1]
        }

    @property
    def rewards_per_nat(self) -> float:
        """Reward per nat of log-ratio, as the record of the first member that has a reference
        declares it; 1 without a declaration."""
        for member in self.members:
            declared = member.record.rewards_per_nat
            if declared is not None and member.record.needs_reference():
                return float(declared(**member.options))
        return 1.0

    @property
    def has_first_value(self) -> bool:
        """Whether the first loss is known when policy and reference are the same model."""
        return self.reference != "none" and all(m.record.first is not None for m in self.members)

    @property
    def first_value(self) -> float | None:
        """That loss, if it does not depend on the data; else None."""
        values = [member.first_value for member in self.members]
        if self.use_weighting or self.mixture is not None or any(value is None for value in values):
            return None
        return sum(m.weight * x for m, x in zip(self.members, values, strict=True) if x is not None)

    @property
    def first_formula(self) -> str:
        """That loss as a formula."""
        if self.mixture is not None:
            return "the loss of the anchor's log-probabilities"
        parts = []
        for member in self.members:
            formula = member.record.first.formula if member.record.first is not None else ""
            if "margins" in member.columns:
                formula = f"{formula} moved by margins"
            if member.replaces_options:
                formula = f"{formula} with the pairs' own values"
            parts.append(formula if member.weight == 1 else f"{member.weight:g} ({formula})")
        formula = " + ".join(parts)
        return f"{formula}, of weighted pairs" if self.use_weighting else formula

    def loss(
        self, inputs: LossInputs, denominators: Denominators | None = None
    ) -> tuple[Tensor, Sums]:
        """This table's share of the step's loss, and its sums of everything that is logged.

        `denominators` are the step's; without them the table is the whole step.
        """
        own = inputs.denominators()
        whole = own if denominators is None else denominators
        total = inputs.scores.new_zeros(())
        sums: Sums = {}
        if self.ld_alpha is not None:
            inputs = replace(inputs, tail_weight=self.ld_alpha)
        weights = inputs.on_policy_weights() if self.use_weighting else None
        if weights is not None:
            sums["weights/mean"] = _mean(weights)
        outputs_of_members = self._outputs(inputs)
        for member, outputs in outputs_of_members:
            losses = outputs.losses if weights is None else weights * outputs.losses
            numerator = _weighted(member.unit, losses, inputs)
            divisor = whole[member.unit]  # 0 in a step without labels, where the sum is 0 too
            total = total + member.weight * (numerator / divisor if divisor else numerator)
            self._log(sums, member, outputs, inputs, (numerator.detach(), own[member.unit]))
        for name, values in self._model_metrics(inputs, outputs_of_members[0][1]).items():
            sums.setdefault(name, _mean(values))
        if self.mixture is not None:
            sums |= {name: _mean(x) for name, x in self.mixture.metrics(inputs).items()}
        return total, sums

    @property
    def needs_blocks(self) -> bool:
        """Whether held-out data has to be evaluated in blocks, each as one step."""
        return self.needs_step or self.needs_mismatches

    @property
    def needs_mismatches(self) -> bool:
        """Whether it needs the data set's mismatched responses."""
        return "kl" in self.columns

    @property
    def needs_running(self) -> bool:
        """Whether it needs the rewards of the run so far."""
        return any(member.record.adds_to_running is not None for member in self.members)

    def advanced(self, inputs: LossInputs) -> LossInputs:
        """The table with `running_rewards` brought up to date by its own responses."""
        for member in self.members:
            add = member.record.adds_to_running
            if add is not None:
                assert inputs.running_rewards is not None
                taken = inspect.signature(add).parameters
                columns = {name: getattr(inputs, name) for name in member.columns if name in taken}
                own = add(**columns, **{k: x for k, x in member.parameters.items() if k in taken})
                inputs = replace(inputs, running_rewards=inputs.running_rewards + own)
        return inputs

    @staticmethod
    def logged(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """`logged_values`, and what follows from several of them."""
        return with_correlation(logged_values(sums))

    def _outputs(self, inputs: LossInputs) -> list[tuple[Member, LossOutputs]]:
        """A likelihood last, so that rewards are those of another member."""
        members = sorted(self.members, key=lambda member: member.record.is_likelihood)
        return [(member, self._member_outputs(member, inputs)) for member in members]

    def _member_outputs(self, member: Member, inputs: LossInputs) -> LossOutputs:
        if self.mixture is None or not member.record.needs_reference():
            return member.outputs(inputs)
        return self.mixture.outputs(member.outputs, member.unit, inputs)

    def _log(
        self,
        sums: Sums,
        member: Member,
        outputs: LossOutputs,
        inputs: LossInputs,
        value: tuple[Tensor, Tensor],
    ) -> None:
        """Add what a member logs, under names that no member before it has."""
        import torch

        new = {name: _mean(values) for name, values in outputs.metrics.items()}
        for name, values in outputs.set_metrics.items():
            weighted = (inputs.set_weights * values).sum()
            new[name] = torch.stack([weighted, inputs.set_weights.sum()])
        for name, pair in outputs.label_metrics.items():
            new[name] = torch.stack(pair)
        if self.is_list:
            new[f"loss/{member.name}"] = torch.stack(value)
        if member.record.is_likelihood:
            new["nll_loss"] = torch.stack(value)
        for name, entry in new.items():
            sums.setdefault(name, entry)

    def _model_metrics(self, inputs: LossInputs, outputs: LossOutputs) -> dict[str, Tensor]:
        """Log-probabilities [P] of a language model, scores of a reward model, and what is watched
        of them; `outputs` are those of the member whose rewards are logged."""
        watched: dict[str, Tensor] = {}
        if "rewards/chosen" in outputs.metrics:
            rewards = outputs.metrics["rewards/chosen"], outputs.metrics["rewards/rejected"]
            watched = length_moments(inputs, *rewards)
        if self.model == "lm":
            return {
                "logps/chosen": inputs.chosen_full_logps.detach(),
                "logps/rejected": inputs.rejected_full_logps.detach(),
                **(log_ratios(inputs) if self.reference != "none" else {}),
                **watched,
            }
        return {"rewards/mean": self.judged(inputs), **watched}

    def accuracies(self, inputs: LossInputs) -> Tensor | None:
        """`rewards/accuracies` of every pair [P]; None if no member has rewards."""
        if self.ld_alpha is not None:
            inputs = replace(inputs, tail_weight=self.ld_alpha)
        return self._outputs(inputs)[0][1].metrics.get("rewards/accuracies")

    def judged(self, inputs: LossInputs) -> Tensor:
        """The scores that enter: of both sides of every pair [2P], or of every response [R]."""
        if self.needs_sets:
            return inputs.scores.detach()
        return inputs.scores.detach()[inputs.pairs].flatten()

    def start(
        self, inputs: LossInputs, denominators: Mapping[str, float] | None
    ) -> tuple[Tensor, Tensor]:
        """This table's share of the step's loss if the policy is the reference, and the largest
        absolute slope of this share near there for each response's log-probability [R]."""
        import torch

        ref_logps, heads = inputs.ref_logps, inputs.ref_heads
        assert ref_logps is not None, "there is no reference"
        with torch.no_grad():
            start = replace(inputs, scores=ref_logps, heads=heads)
            value, _ = self.loss(start, denominators)
        slopes = torch.zeros_like(ref_logps)
        for shift in (-NEAR, NEAR):  # a loss may have a corner at the start, as DPOP's has
            with torch.enable_grad():
                moved = [(x.detach() + shift).requires_grad_() for x in _given(ref_logps, heads)]
                near = replace(
                    start, scores=moved[0], heads=moved[-1] if heads is not None else None
                )
                loss, _ = self.loss(near, denominators)
                result = [x.abs() for x in torch.autograd.grad(loss, moved, materialize_grads=True)]
            if heads is not None:  # a head may be off by no more than its response
                result[0].index_add_(0, inputs.pairs.flatten(), result[1].flatten())
            slopes = slopes.maximum(result[0])
        return value, slopes

    def extremes(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Largest values of this table, by the name under which the step's largest is logged; one
        that ends in `/min` is the negative of the least. Nothing for language models."""
        import torch

        if self.model == "lm":
            return {}
        scores = self.judged(inputs)
        least = scores.new_full((1,), -float("inf"))
        return {
            "rewards/min": torch.cat([-scores, least]).amax(),
            "rewards/max": torch.cat([scores, least]).amax(),
        }


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _weighted(unit: Unit, losses: Tensor, inputs: LossInputs) -> Tensor:
    """Weighted sum over the units of a table."""
    if unit == "set":
        return (inputs.set_weights * losses).sum()
    return losses.sum() if unit in ("response", "label") else (inputs.pair_weights * losses).sum()


def _mean(values: Tensor) -> Tensor:
    """Sum and count, [2]."""
    import torch

    return torch.stack([values.sum(), values.new_full((), len(values))])
