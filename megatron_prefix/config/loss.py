"""The loss section: the objective and its options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import (
    KNOWN_KEYS,
    Count,
    NonNegative,
    PathText,
    Positive,
    SetName,
    Switch,
)

MOST_MEMBERS = 16
"""Loss types of a list."""
MOST_REFERENCES = 64
WEIGHTINGS = (
    "uniform",
    "adaptive",
    "validation_confidence",
    "validation_accuracy",
    "sliding_window",
    "thompson",
)
"""How references are weighted, if no list of weights is given."""


def _loss_types(value: Any) -> str | list[str]:
    """A name, or a list of names."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("expected a name, or a list of names")
    if not 1 <= len(value) <= MOST_MEMBERS:
        raise ValueError(f"expected 1 to {MOST_MEMBERS} names")
    return list(value)


def _reference_weights(value: Any) -> str | list[float]:
    """A name, or a list of weights."""
    if isinstance(value, str):
        if value in WEIGHTINGS:
            return value
    elif isinstance(value, list) and value and all(map(_is_weight, value)):
        return [float(x) for x in value]
    raise ValueError(f"expected one of {', '.join(WEIGHTINGS)}, or a list of weights from 0")


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST


LARGEST = 1e9
"""Largest weight of a reference."""
LossTypes = Annotated[str | list[str], PlainValidator(_loss_types)]
Attribute = Annotated[int, Field(strict=True, ge=0, lt=64)]
ReferenceWeights = Annotated[str | list[float], PlainValidator(_reference_weights)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class ReferenceFile:
    """One of several references."""

    name: SetName
    """Name in metrics."""
    ref_logps: PathText
    """Sidecar for `data.train` that `score --output` wrote, with any model."""


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class LossConfig:
    """The objective over pairs, comparison sets or responses.

    `megatron_prefix.objectives.check` says which of the options an objective uses, and refuses
    those that none uses; None is "not given". docs/losses.md has the equations.
    """

    loss_type: LossTypes = "sigmoid"
    """Name of the objective, or a list of them whose weighted sum is minimised. docs/losses.md has
    the names. `package.module:NAME` is an ObjectiveRecord on the Python path."""
    loss_weights: Annotated[list[Positive], Field(min_length=1, max_length=MOST_MEMBERS)] | None = (
        None
    )
    """What multiplies each member of a list; 1 each if not given."""
    beta: Positive | None = None
    """Reward per nat of log-probability ratio; tau of `ipo`, lambda of `orpo`. 0.1 if not given."""
    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=0.5)] | None = None
    """Probability that a label is wrong; 0 if not given, 0.001 for `exo_pair`."""
    f_divergence_type: (
        Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None
    ) = None
    """The divergence that keeps the policy near the reference; `reverse_kl` if not given."""
    f_alpha_divergence_coef: (
        Annotated[float, Field(strict=True, ge=0, le=10, allow_inf_nan=False)] | None
    ) = None
    """Alpha of `alpha_divergence`: 1 is the reverse, 0 the forward KL divergence; 0.5 if not
    given."""
    ld_alpha: Share | None = None
    """What multiplies the log-probability of the tokens by which the longer side of a pair exceeds
    the shorter one; they count whole if not given."""
    use_weighting: Switch | None = None
    """A pair's loss is multiplied by how likely the policy would write both sides itself (WPO)."""
    dpop_lambda: Positive | None = None
    """For `sigmoid`: penalty per nat by which the chosen response becomes less likely than under
    the reference, in nats of the log-ratio. No penalty if not given."""
    discopop_tau: (
        Annotated[float, Field(strict=True, ge=1e-6, le=1e6, allow_inf_nan=False)] | None
    ) = None
    """Temperature of the blend of `discopop`; 0.05 if not given."""
    reward_scale: Positive | None = None
    """For the `rpo_` losses: reward per unit of the data's scores; 1 if not given."""
    sft_average: Literal["token", "response"] | None = None
    """Mean of the negative log-likelihood of `sft`: over all tokens of chosen responses (`token`,
    if not given), or over responses, each by its own tokens."""
    cpo_alpha: NonNegative | None = None
    """Weight of `sft` in `cpo`; 1 if not given."""
    simpo_gamma: NonNegative | None = None
    """Margin of `simpo`, in units of reward; 0.5 if not given."""
    alpha: Annotated[float, Field(strict=True, gt=-1, le=10, allow_inf_nan=False)] | None = None
    """For `simpo`: the exponent of AlphaPO's reward; 0 (the log-probability) if not given."""
    desirable_weight: NonNegative | None = None
    """For `kto` and `apo_zero_unpaired`: what multiplies the loss of desirable responses; 1 if not
    given."""
    undesirable_weight: NonNegative | None = None
    """The same of undesirable responses."""
    temperature: Annotated[float, Field(strict=True, ge=1e-6, le=1e6)] | None = None
    """For `infonca` and `nca`: what the data's scores are divided by; 1 if not given."""
    comparisons: Literal["all", "best_vs_rest", "best_vs_worst", "adjacent"] | None = None
    """Which pairs of a ranked set enter, by levels of rank; `all` if not given."""
    attribute: Attribute | None = None
    """With `model.num_labels` above 1: the attribute that rewards, pairs and accuracies are
    about, counted from 0; the first if not given."""
    margin: Switch | None = None
    """The chosen reward has to exceed the rejected one by the pair's own margin, which every
    pair of the data sets must have."""
    pair_beta: Switch | None = None
    """A pair that has a `beta` in the data takes it instead of `beta`."""
    center_rewards_coefficient: Positive | None = None
    """For `bradley_terry`: adds this times (chosen + rejected reward)^2 to a pair's loss."""
    weighting: Literal["pair", "group"] | None = None
    """For losses over pairs. `pair` (default): every pair weighs 1 (times its own weight);
    `group`: every comparison set does."""
    reference: Literal["model", "precomputed", "none"] | None = None
    """`model`: a frozen copy of the initial policy, run over each step's rows; `precomputed`:
    log-probabilities that `score` wrote, read from `ref_logps`; `none`: no reference; with
    `sigmoid`, `hinge` and `ipo` its log-probabilities then count as 0. Default: `model` if an
    objective has a reference, else `none`."""
    ref_logps: PathText | None = None
    """Sidecar for `data.train` that `score --output` wrote; with `reference: precomputed`."""
    references: (
        Annotated[tuple[ReferenceFile, ...], Field(min_length=1, max_length=MOST_REFERENCES)] | None
    ) = None
    """Several references, each a sidecar with a name, instead of `reference` and `ref_logps`."""
    reference_mixture: Literal["multi_dpo", "harmonic", "geometric"] | None = None
    """How `references` become one: the weighted mean of the losses with each (`multi_dpo`), the
    weighted harmonic mean of their probabilities (MRPO), or the geometric one. `multi_dpo` if not
    given."""
    reference_weights: ReferenceWeights | None = None
    """Weight of each reference: a list, which is divided by its sum, or the name of a rule.
    `uniform` if not given."""
    reference_clip: Positive | None = None
    """For `harmonic`: by how much a log-probability may differ from the anchor's, relative to it,
    both sides of a pair together. 0.1 if not given."""
    reference_clip_split: Switch | None = None
    """For `harmonic`: `reference_clip` is divided among the sides of a pair (true, if not given),
    or each side has the whole of it."""
    reference_anchor: SetName | None = None
    """The reference that others are clipped around, and from which the first step's rewards are
    checked. If not given, the one whose model is the initial policy."""
    reference_window: Count | None = None
    """For `sliding_window`: how many pairs of earlier steps count. 256 if not given."""


RETIRED = {
    "f_divergence_params": "f_alpha_divergence_coef",
    "gamma_beta_ratio": "simpo_gamma: X, which is gamma_beta_ratio times beta",
    "pref_ftx": "loss_type: [sigmoid, sft] and loss_weights: [1.0, X]",
    "reference_free": "reference: none",
    "rpo_alpha": "loss_type: [sigmoid, sft] and loss_weights: [1.0, X]",
    "tau": "beta",
}
"""Keys of other programs or versions, and how they are spelled here."""
