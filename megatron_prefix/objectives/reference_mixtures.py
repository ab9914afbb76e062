"""Several references as one: mixtures of their log-probabilities or of the losses with each.

    multi_dpo   sum over k of w_k loss(pi_k)
    geometric   log pi_ref = sum over k of w_k log pi_k
    harmonic    pi_ref = 1 / (sum over k of w_k / pi_k), after a clip around one of them, the anchor

The weights w_k sum to 1. They are one number per reference and step, or `adaptive`: one per
reference and pair. Mixtures are made per pair and side, because clip and adaptive weights differ
between pairs; for losses over sets, per response.

Shapes: K references, R responses, P pairs. Log-probabilities are sums over a response's tokens, in
nats, float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from megatron_prefix.objectives.record import LossOutputs, Unit
from megatron_prefix.objectives.table import LossInputs, ReferenceColumns

if TYPE_CHECKING:
    from torch import Tensor

Mixture = Literal["multi_dpo", "harmonic", "geometric"]


def geometric_mixture(ref_logps: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of log-probabilities.

        log pi_ref = sum over k of w_k log pi_k

    With reverse KL penalties to several references, weighted by w_k, the best policy is that of
    one penalty to this mixture. It is not normalised over responses; the constant falls out of
    differences within a prompt. `ref_logps` is [K, …], `weights` broadcasts to it.
    """
    return (weights * ref_logps).sum(dim=0)


def harmonic_mixture(ref_logps: Tensor, weights: Tensor) -> Tensor:
    """Weighted harmonic mean of probabilities.

        log pi_ref = -log(sum over k of w_k / pi_k)

    Le et al. 2024 (MRPO, arXiv 2405.16388), their bound's reference. `ref_logps` is [K, …],
    `weights` broadcasts to it.
    """
    return -(weights.log() - ref_logps).logsumexp(dim=0)


def adaptive_weights(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Weights by how clearly each reference decides a pair; both arguments and the result [K, P].

        w_k = |a_k| / sum over j of |a_j|,   a_k = log pi_k(chosen) - log pi_k(rejected)

    Le et al. 2024 (MRPO, arXiv 2405.16388). The published code exchanges the two weights in the
    harmonic mixture, which contradicts the formula; here it is the formula. It adds 1e-6 to the
    divisor; here a pair that no reference decides has equal weights.
    """
    import torch

    decided = (chosen - rejected).abs()
    total = decided.sum(dim=0)
    return torch.where(total > 0, decided / total.where(total > 0, 1.0), 1 / len(chosen))


def clip_around_anchor(
    chosen: Tensor, rejected: Tensor, anchor: int, clip: float, is_split: bool
) -> tuple[Tensor, Tensor]:
    """Both sides of pairs [K, P], each log-probability no farther from the anchor's than a part of
    it.

        |log pi_k - log pi_anchor| <= e |log pi_anchor|
        e of the chosen side = clip B_c / (B_c + B_r), of the rejected side the rest of `clip`

    B is |mean over references of log pi| of a side, before the clip. Le et al. 2024 (MRPO, arXiv
    2405.16388), whose code has two references; for more, the mean over all of them is ours.
    Without `is_split` each side has the whole of `clip`.
    """
    share_chosen: Tensor | float = clip
    share_rejected: Tensor | float = clip
    if is_split:
        size = chosen.mean(dim=0).abs()
        total = size + rejected.mean(dim=0).abs()
        share_chosen = clip * (size / total).where(total > 0, 0.5)
        share_rejected = clip - share_chosen
    return (
        _clipped(chosen, chosen[anchor], share_chosen),
        _clipped(rejected, rejected[anchor], share_rejected),
    )


def _clipped(logps: Tensor, anchor: Tensor, share: Tensor | float) -> Tensor:
    # log-probabilities are negative: -10 and a share of 0.1 give [-11, -9]
    return logps.maximum(anchor * (1 + share)).minimum(anchor * (1 - share))


@dataclass(frozen=True, kw_only=True)
class ReferenceMixture:
    """How the references of a run become one."""

    names: tuple[str, ...]
    """Of the references, in the order of their columns."""
    kind: Mixture = "multi_dpo"
    weighting: str | tuple[float, ...] = "uniform"
    """The rule that gives each step's weights, or weights that sum to 1."""
    anchor: str | None = None
    """The reference that others are clipped around, if the configuration names it."""
    clip: float = 0.1
    is_split: bool = True
    """Whether the sides of a pair share `clip`."""
    window: int = 256
    """Pairs of earlier steps that `sliding_window` counts."""

    @property
    def is_learned(self) -> bool:
        """Whether the weights come from earlier steps or held-out pairs."""
        return isinstance(self.weighting, str) and self.weighting not in ("uniform", "adaptive")

    def settings(self) -> dict[str, Any]:
        """The keys of the loss section that have an effect, each with its value."""
        weights = self.weighting if isinstance(self.weighting, str) else list(self.weighting)
        settings: dict[str, Any] = {"reference_mixture": self.kind, "reference_weights": weights}
        if self.kind == "harmonic":
            settings |= {"reference_clip": self.clip, "reference_clip_split": self.is_split}
        if self.weighting == "sliding_window":
            settings["reference_window"] = self.window
        return settings

    def outputs(
        self, outputs_of: Callable[[LossInputs], LossOutputs], unit: Unit, inputs: LossInputs
    ) -> LossOutputs:
        """Values of a loss with the mixture as its reference.

        With `multi_dpo` rewards are the weighted means of those with each reference, so they are
        those with the geometric mixture; so are all metrics.
        """
        import torch

        mixed = outputs_of(self._mixed(inputs, unit))
        if self.kind != "multi_dpo":
            return mixed
        references = references_of(inputs)
        losses = torch.stack(
            [outputs_of(with_one(inputs, k)).losses for k in range(len(references.logps))]
        )
        return replace(mixed, losses=(self._weights(inputs) * losses).sum(dim=0))

    def metrics(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Weight of each reference, and whether it prefers the chosen response, [P] each."""
        references, pairs = references_of(inputs), inputs.pairs
        values: dict[str, Tensor] = {}
        weights = self._weights(inputs).expand(-1, len(pairs))
        for name, weight, logps in zip(self.names, weights, references.logps, strict=True):
            values[f"reference_weights/{name}"] = weight
            difference = logps[pairs[:, 0]] - logps[pairs[:, 1]]
            values[f"reference_accuracies/{name}"] = (difference.sign() + 1) / 2
        return values

    def _mixed(self, inputs: LossInputs, unit: Unit) -> LossInputs:
        """The table with one reference: the mixture, geometric unless it is harmonic."""
        import torch

        references = references_of(inputs)
        if unit == "set":
            logps = references.logps
            weights = self._weights(inputs)
            if self.kind == "harmonic":
                logps = _clipped(logps, logps[references.anchor], self.clip)
                return with_one(inputs, None, harmonic_mixture(logps, weights))
            return with_one(inputs, None, geometric_mixture(logps, weights))
        sides = _sides(inputs)
        mix = geometric_mixture
        if self.kind == "harmonic":
            mix = harmonic_mixture
            sides = clip_around_anchor(*sides, references.anchor, self.clip, self.is_split)
        weights = self._weights(inputs)
        mixed = torch.stack([mix(side, weights) for side in sides], dim=1)
        return replace(inputs, ref_sides=mixed)

    def _weights(self, inputs: LossInputs) -> Tensor:
        """[K, P] if they are made per pair, else [K, 1]."""
        if self.weighting == "adaptive":
            return adaptive_weights(*_sides(inputs))
        weights = references_of(inputs).weights
        if weights is None:
            raise ValueError("the batch has references without weights: pass the step's weights")
        return weights[:, None]


def references_of(inputs: LossInputs) -> ReferenceColumns:
    if inputs.references is None:
        raise ValueError(
            "the batch has no references: add them with TrainBatch.with_several_references"
        )
    return inputs.references


def with_one(inputs: LossInputs, index: int | None, logps: Tensor | None = None) -> LossInputs:
    """The table with reference `index` alone, or with `logps` [R] as the only one."""
    references = references_of(inputs)
    heads = None
    if index is not None:
        logps = references.logps[index]
        heads = None if references.heads is None else references.heads[index]
    return replace(inputs, ref_logps=logps, ref_heads=heads, references=None, ref_sides=None)


def _sides(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both sides of all pairs under every reference, [K, P] each."""
    import torch

    each = [with_one(inputs, k) for k in range(len(references_of(inputs).logps))]
    chosen = torch.stack([one.ref_chosen_logps for one in each])
    return chosen, torch.stack([one.ref_rejected_logps for one in each])
