"""LossInputs: the table of responses, pairs and comparison sets that objectives read.

Shapes: R responses, P pairs, S comparison sets, K responses of the largest set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


WITHOUT_PARTS = (
    "the row was made without what it needs: pass parts=objectives.check(loss).parts to to_device"
)


@dataclass(frozen=True, kw_only=True)
class ScoreParts:
    """What a model computes of a row or a data set beside the score of each response [R].

    All of it is one vector: the scores [R], then the heads of both sides of each pair [2P], then
    the alignments [R], as far as they are asked for.
    """

    heads: bool = False
    """Log-probability of the first tokens of each side, as many as the shorter side has."""
    alignments: bool = False
    """Mean over each response's tokens of logp - log(sum over the vocabulary of p^2)."""
    num_labels: int = 1
    """Scores that a reward model gives each response. If there are several, the vector has those
    of one attribute [R], and then those of each attribute in turn [A R]."""
    attribute: int = 0
    """The attribute whose scores come first."""

    def split(self, vector: Any, num_responses: int) -> tuple[Any, Any, Any]:
        """Scores [R], heads [P, 2] or None, alignments [R] or None; of a tensor or an array."""
        if self.num_labels > 1:
            return vector[:num_responses], None, None
        end = len(vector) - num_responses if self.alignments else len(vector)
        heads = vector[num_responses:end].reshape(-1, 2) if self.heads else None
        return vector[:num_responses], heads, vector[end:] if self.alignments else None

    def attribute_scores(self, vector: Any, num_responses: int) -> Any:
        """Scores of all attributes [R, A], or None if there is one; of a tensor or an array."""
        if self.num_labels == 1:
            return None
        return vector[num_responses:].reshape(self.num_labels, -1).T


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceColumns:
    """What several references say of a table; K references."""

    logps: Tensor
    """Float64 [K, R]: log-probabilities under each."""
    weights: Tensor | None
    """Float64 [K]: the weights of the step, which sum to 1; None if they are made per pair."""
    anchor: int
    """The reference that others are clipped around; also the table's `ref_logps`."""
    heads: Tensor | None = None
    """Float64 [K, P, 2]: `ref_heads` under each."""

    def part(self, responses: slice, pairs: slice) -> ReferenceColumns:
        """Those of a part of the table."""
        heads = None if self.heads is None else self.heads[:, pairs]
        return replace(self, logps=self.logps[:, responses], heads=heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """Table of responses and their pairs: a row's in training, a data set's in evaluation.

    A loss names the columns that it takes: a field or a property. Those that begin with `chosen_`
    or `rejected_` are one side of the pairs [P]; those that begin with `set_` are the responses of
    each comparison set [S, K], where `set_mask` says which entries are responses.
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
    pair_weights: Tensor
    """Float64 [P]: what each pair weighs in the mean."""
    ranks: Tensor
    """Int64 [R]: 0 for the best of a set, -1 if unknown."""
    labels: Tensor
    """Float64 [R]: the scores that the data gives; NaN if it gives none."""
    members: Tensor
    """Int64 [S, K]: the responses of each comparison set in their order; -1 fills up."""
    set_weights: Tensor
    """Float64 [S]: 1 for a set with a pair, 0 for one with nothing to compare."""
    betas: Tensor | None = None
    """Float64 [P]: the pair's own `loss.beta`; NaN for that of the run."""
    heads: Tensor | None = None
    """Float64 [P, 2]: the part of both sides' log-probabilities that is of their first tokens, as
    many as the shorter side has; None without `tail_weight`."""
    ref_heads: Tensor | None = None
    """Float64 [P, 2]: the same under the reference."""
    references: ReferenceColumns | None = None
    """Several references; `ref_logps` and `ref_heads` are then those of the anchor."""
    ref_sides: Tensor | None = None
    """Float64 [P, 2]: log-probabilities of both sides of the pairs under a mixture of references;
    None if they are those of `ref_logps`."""
    attribute_scores: Tensor | None = None
    """Float64 [R, A]: a reward model's scores of A attributes; `scores` are those of one of them.
    None if there is one."""
    attributes: Tensor | None = None
    """Float64 [R, A]: the scores that the data gives for them; NaN if it gives none."""
    attribute_names: tuple[str, ...] = ()
    """Of the A attributes; empty if there is one."""
    desirable: Tensor | None = None
    """Float64 [R]: 1 for a response labelled good, 0 for bad, NaN without a label; None if the
    rows were made without labels."""
    kl: Tensor | None = None
    """Float64, 0-dimensional: how far the policy is from the reference on mismatched responses of
    the step, in nats, at least 0; see `kto`."""
    running_rewards: Tensor | None = None
    """Float64 [2]: sum and number of the rewards of the run up to this step, see `bco`."""
    tail_weight: float | None = None
    """What multiplies the log-probability of the tokens after the head; None: they count whole."""
    alignments: Tensor | None = None
    """Float64 [R]: see ScoreParts; None if no objective needs them."""

    @classmethod
    def of_arrays(cls, columns: Mapping[str, np.ndarray], **tensors: Any) -> LossInputs:
        """A table on the CPU, from columns of the data by name, and what a model computed."""
        import torch

        data = {name: torch.from_numpy(column) for name, column in columns.items()}
        return cls(**data, **tensors)  # type: ignore[arg-type]

    def part(self, responses: slice, pairs: slice) -> LossInputs:
        """The table of consecutive responses and pairs, which have only each other."""
        first, stop = responses.start, responses.stop
        own_sets = (self.members[:, 0] >= first) & (self.members[:, 0] < stop)
        members = self.members[own_sets]

        def of(column: Tensor | None, which: slice) -> Any:
            return None if column is None else column[which]

        return replace(
            self,
            scores=self.scores[responses],
            ref_logps=of(self.ref_logps, responses),
            num_tokens=self.num_tokens[responses],
            pairs=self.pairs[pairs] - first,
            margins=self.margins[pairs],
            betas=of(self.betas, pairs),
            pair_weights=self.pair_weights[pairs],
            ranks=self.ranks[responses],
            labels=self.labels[responses],
            desirable=of(self.desirable, responses),
            members=members.where(members < 0, members - first),
            set_weights=self.set_weights[own_sets],
            heads=of(self.heads, pairs),
            ref_heads=of(self.ref_heads, pairs),
            attribute_scores=of(self.attribute_scores, responses),
            attributes=of(self.attributes, responses),
            references=None if self.references is None else self.references.part(responses, pairs),
            alignments=of(self.alignments, responses),
        )

    @property
    def chosen_logps(self) -> Tensor:
        return self._side(self.scores, self.heads, 0)

    @property
    def rejected_logps(self) -> Tensor:
        return self._side(self.scores, self.heads, 1)

    @property
    def chosen_full_logps(self) -> Tensor:
        return self.scores[self.pairs[:, 0]]

    @property
    def rejected_full_logps(self) -> Tensor:
        return self.scores[self.pairs[:, 1]]

    @property
    def chosen_rewards(self) -> Tensor:
        return self.scores[self.pairs[:, 0]]

    @property
    def rejected_rewards(self) -> Tensor:
        return self.scores[self.pairs[:, 1]]

    @property
    def ref_chosen_logps(self) -> Tensor:
        if self.ref_sides is not None:
            return self.ref_sides[:, 0]
        return self._side(self._reference(), self.ref_heads, 0)

    @property
    def ref_rejected_logps(self) -> Tensor:
        if self.ref_sides is not None:
            return self.ref_sides[:, 1]
        return self._side(self._reference(), self.ref_heads, 1)

    @property
    def chosen_num_tokens(self) -> Tensor:
        return self.num_tokens[self.pairs[:, 0]]

    @property
    def rejected_num_tokens(self) -> Tensor:
        return self.num_tokens[self.pairs[:, 1]]

    @property
    def chosen_labels(self) -> Tensor:
        return self.labels[self.pairs[:, 0]]

    @property
    def rejected_labels(self) -> Tensor:
        return self.labels[self.pairs[:, 1]]

    @property
    def label_scores(self) -> Tensor:
        """Float64 [R, A]: the scores that are compared with labels."""
        return self.scores[:, None] if self.attribute_scores is None else self.attribute_scores

    @property
    def label_values(self) -> Tensor:
        """Float64 [R, A]: these labels."""
        if self.attribute_scores is None:
            return self.labels[:, None]
        if self.attributes is None:
            raise ValueError("the table has scores of attributes, but no attributes of the data")
        return self.attributes

    @cached_property
    def set_mask(self) -> Tensor:
        """Bool [S, K]: whether the entry is a response."""
        return self.members >= 0

    @property
    def set_scores(self) -> Tensor:
        """Float64 [S, K]: log-probabilities or rewards; 0 fills up."""
        return self._of_sets(self.scores, 0.0)

    @property
    def set_ref_logps(self) -> Tensor:
        """Float64 [S, K]; 0 fills up."""
        return self._of_sets(self._reference(), 0.0)

    @property
    def set_ranks(self) -> Tensor:
        """Int64 [S, K]; -1 fills up."""
        return self._of_sets(self.ranks, -1)

    @property
    def set_labels(self) -> Tensor:
        """Float64 [S, K]; NaN fills up."""
        return self._of_sets(self.labels, float("nan"))

    def denominators(self) -> dict[str, Tensor]:
        """What the loss of each unit is divided by if this table is a whole step, 0-dimensional."""
        is_labelled = ~self.label_values.isnan()
        return {
            "pair": self.pair_weights.sum(),
            "set": self.set_weights.sum(),
            "response": is_labelled.sum().to(self.set_weights.dtype),
            "token": (self.pair_weights * self.chosen_num_tokens).sum(),
            "label": self._num_labelled(),
        }

    def _num_labelled(self) -> Tensor:
        if self.desirable is None:
            return self.pair_weights.new_zeros(())
        return (~self.desirable.isnan()).sum().to(self.pair_weights.dtype)

    def on_policy_weights(self) -> Tensor:
        """Float64 [P]: how likely the policy itself would write both sides of a pair, relative to
        what it would write, per token; without gradient."""
        if self.alignments is None:
            raise ValueError(f"loss.use_weighting: {WITHOUT_PARTS}")
        return self.alignments.detach()[self.pairs].sum(dim=1).exp()

    def _side(self, logps: Tensor, heads: Tensor | None, side: int) -> Tensor:
        """Log-probabilities of one side of the pairs, the tail of the longer one weighted."""
        whole = logps[self.pairs[:, side]]
        if self.tail_weight is None:
            return whole
        if heads is None:
            raise ValueError(f"loss.ld_alpha: {WITHOUT_PARTS}")
        return heads[:, side] + self.tail_weight * (whole - heads[:, side])

    def _of_sets(self, column: Tensor, fill: float) -> Tensor:
        entries = column[self.members.clamp(min=0)]
        return entries.masked_fill(~self.set_mask, fill)

    def _reference(self) -> Tensor:
        if self.ref_logps is None:
            raise ValueError("the batch has no ref_logps: add them with TrainBatch.with_reference")
        return self.ref_logps
