"""What an objective is: one record, the values that its function returns, and shared helpers.

Shapes: P pairs, S comparison sets, R responses. Nothing in this package imports torch before a loss
is computed, so that a configuration is checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["pair", "set", "response", "token", "label"]
"""What has one loss value each, and what the mean is over:

    pair      the loss of a pair [P]; the denominator is the sum of the pairs' weights
    set       the loss of a comparison set [S]; the number of sets with a pair
    response  the loss of a response [R]; the number of scores
    label     the loss of a response [R]; the number of responses labelled desirable or undesirable
    token     the sum over the tokens of a pair's chosen response [P]; the weighted number of these

Every denominator is that of the whole step and known before it.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOutputs:
    """Values of a loss, by name."""

    losses: Tensor
    """[P], [S] or [R] by the objective's unit: the loss of every unit, before weights."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """[P] each, without gradient, by the name under which their mean over pairs is logged."""
    set_metrics: dict[str, Tensor] = field(default_factory=dict)
    """[S] each, without gradient; logged is the mean over sets with a pair."""
    label_metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sum and count, without gradient; logged is the sum over the count of the whole step. Of a
    name that begins with `count/` the sum is logged; its count is 0."""


def logged_values(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """What is logged of the sums and counts of `Objective.loss`, added up over rows and ranks:
    means, and sums of `count/` names. A mean of nothing is left out. Without pairs,
    `rewards/margins` is the difference of the means of both sides."""
    values = {
        name: total if name.startswith("count/") else total / count
        for name, (total, count) in sums.items()
        if count or name.startswith("count/")
    }
    sides = [values.get(f"rewards/{side}") for side in ("chosen", "rejected")]
    if "rewards/margins" not in values and sides[0] is not None and sides[1] is not None:
        values["rewards/margins"] = sides[0] - sides[1]
    return values


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), which does not overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - s) log sigmoid(x) - s log sigmoid(-x): labels are wrong with probability s."""
    s = label_smoothing
    return -(1 - s) * log_sigmoid(logits) - s * log_sigmoid(-logits)


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """The logged values of two rewards per pair. An equal pair counts 1/2 in the accuracy."""
    chosen, rejected = chosen.detach(), rejected.detach()
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,
    }


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting of the loss section that an objective takes."""

    default: Any = None
    """Value if the configuration gives none."""
    is_allowed: Callable[[Any], bool] | None = None
    """Narrows what the schema allows."""
    allowed: str = ""
    """The values of `is_allowed` in words, for the error."""
    column: str | None = None
    """None: the option is passed to the function, under its own name. A column of `LossInputs`: the
    option is a switch; if it is true, this column is passed to the function instead."""
    replaces: str | None = None
    """With `column`: not the column is passed to the function, but the option of this name, with
    the column's value [P] for each pair where that is not NaN."""
    is_outside: bool = False
    """The option acts outside of the function and is not passed to it."""
    of_all: bool = False
    """In a list of loss types, every member must take the option."""
    spares_likelihoods: bool = True
    """A likelihood in that list is left as it is."""
    needs: tuple[str, Any] | None = None
    """(option, value): this option has an effect only if that one has this value."""


PAIR_OPTIONS = {
    "ld_alpha": Option(is_outside=True, of_all=True),
    "use_weighting": Option(default=False, is_outside=True, of_all=True, spares_likelihoods=False),
}
"""Options of every loss over the pairs of a language model with a reference."""


PAIR_BETA = {"pair_beta": Option(default=False, column="betas", replaces="beta", of_all=True)}
"""The option of every loss over pairs whose `beta` may be the pair's own."""


@dataclass(frozen=True, kw_only=True)
class FirstValue:
    """Loss of the first step, when policy and reference are the same model."""

    formula: str
    value: Callable[..., float | None] | None = None
    """Of the options, by name; None if it depends on the data."""


@dataclass(frozen=True, kw_only=True)
class Added:
    """Another objective that is part of this one: its loss is added."""

    name: str
    weight: str | None = None
    """The option, of those that act outside of the function, that multiplies it; None: 1."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecord:
    """All that the program knows about one objective."""

    name: str
    """As `loss.loss_type` gives it."""
    function: Callable[..., LossOutputs]
    """Pure. Called with `columns` and the options, all by name."""
    columns: tuple[str, ...]
    """What it always needs of the data: names of `LossInputs`."""
    options: Mapping[str, Option]
    model: Literal["lm", "reward"]
    """The `model.kind` that it trains."""
    unit: Unit | Callable[..., Unit] = "pair"
    """A function of the options, by name, if it depends on them."""
    rewards_per_nat: Callable[..., float] | None = None
    """Of the options, by name: reward per nat of log-ratio. None: 1."""
    first: FirstValue | None = None
    """None if there is no first value that is known before the step."""
    adds: Added | None = None
    is_likelihood: bool = False
    """The negative log-likelihood of chosen responses, a term beside preference losses: logged as
    `nll_loss`; rewards are those of another member of the list."""
    scope: Literal["set", "step"] = "set"
    """`set`: the loss of a step is the sum over any split into comparison sets. `step`: it needs
    all responses of the step at once, so a step runs in two passes (engine/table.py)."""
    adds_to_running: Callable[..., Tensor] | None = None
    """What a step adds to `LossInputs.running_rewards`, float64 [2], before its loss is computed.
    Called with those of `columns` and options that it takes, by name."""
    takes_weights: bool = True
    """Whether pairs may have weights other than 1."""
    may_omit_reference: bool = False
    """With `loss.reference: none` the reference's log-probabilities count as 0."""
    reward_variant: ObjectiveRecord | None = None
    """The objective of the same name for reward models, if there is one."""

    def needs_reference(self) -> bool:
        return any(column.startswith(("ref_", "set_ref_")) for column in self.columns)

    def unit_of(self, options: Mapping[str, Any]) -> Unit:
        return self.unit(**options) if callable(self.unit) else self.unit

    def variant(self, model_kind: str | None) -> ObjectiveRecord:
        """The record for this kind of model, if there are two of this name."""
        other = self.reward_variant
        return other if other is not None and model_kind == other.model else self

    def all_columns(self, options: Mapping[str, Any]) -> Iterator[str]:
        """The columns that the function reads under these options."""
        yield from self.columns
        for name, option in self.options.items():
            if option.column is not None and options[name]:
                yield option.column
