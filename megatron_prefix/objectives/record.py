"""What an objective is: one record, the table that it reads, the values that it returns.

Shapes: R responses, P pairs. Nothing in this package imports torch before a loss is computed, so
that a configuration is checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["pair"]
"""The unit that has one loss value; the mean is over these units."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """Table of responses and their pairs: a row's in training, a data set's in evaluation.

    A loss names the columns that it takes: a field, or a property that is one side of the pairs.
    """

    scores: Tensor
    """Float64 [R]: log-probabilities under the policy in nats, or the rewards of a reward model."""
    ref_logps: Tensor | None
    """Float64 [R]: log-probabilities under the reference; None if there is no reference."""
    num_tokens: Tensor
    """Int64 [R]: each response's own tokens, which are those with loss."""
    pairs: Tensor
    """Int64 [P, 2]: (chosen, rejected) as indices of responses."""
    margins: Tensor
    """Float64 [P]: NaN if the data has no margin for the pair."""

    @property
    def chosen_logps(self) -> Tensor:
        return self.scores[self.pairs[:, 0]]

    @property
    def rejected_logps(self) -> Tensor:
        return self.scores[self.pairs[:, 1]]

    @property
    def chosen_rewards(self) -> Tensor:
        return self.scores[self.pairs[:, 0]]

    @property
    def rejected_rewards(self) -> Tensor:
        return self.scores[self.pairs[:, 1]]

    @property
    def ref_chosen_logps(self) -> Tensor:
        return self._reference()[self.pairs[:, 0]]

    @property
    def ref_rejected_logps(self) -> Tensor:
        return self._reference()[self.pairs[:, 1]]

    @property
    def chosen_num_tokens(self) -> Tensor:
        return self.num_tokens[self.pairs[:, 0]]

    @property
    def rejected_num_tokens(self) -> Tensor:
        return self.num_tokens[self.pairs[:, 1]]

    def _reference(self) -> Tensor:
        if self.ref_logps is None:
            raise ValueError("the batch has no ref_logps: add them with TrainBatch.with_reference")
        return self.ref_logps


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOutputs:
    """Values of a loss, by name."""

    losses: Tensor
    """[P]: the loss of every pair, before weights."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """[P] each, without gradient, by the name under which their mean over pairs is logged."""


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), which does not overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


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


@dataclass(frozen=True, kw_only=True)
class FirstValue:
    """Loss of each pair at the first step, when policy and reference are the same model."""

    formula: str
    value: Callable[..., float]
    """Of the options, by name."""
    steepness: Callable[..., float]
    """Of the options, by name. Largest slope at the first step: change of the loss per unit by
    which both rewards move, in the same or opposite directions."""
    per_token: bool = False
    """Whether the rewards enter per token: a reward of n tokens has an n-th of that slope."""


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
    unit: Unit = "pair"
    rewards_per_nat: Callable[..., float] | None = None
    """Of the options, by name: reward per nat of log-ratio. None: 1."""
    first: FirstValue | None = None
    """None if the first value depends on the data, or there is no reference."""
