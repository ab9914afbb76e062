"""TrainBatch: a row on the device, as one micro batch of Megatron-Core's schedule takes it.

Shapes: T tokens, N targets, R responses of the row, P pairs of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.attention import TreePackedSeqParams, TreePlan
from megatron_prefix.attention.context_parallel import ContextShare
from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.engine.pictures import PixelSource, row_pixels
from megatron_prefix.model.vision import RowPixels, axis_positions
from megatron_prefix.objectives import LossInputs, ReferenceColumns, ScoreParts
from megatron_prefix.platform import on_device


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """One row on the device: what `forward_step` takes from its iterator.

    tokens int64 [1, T]; `params` goes to the model. `response_order` [N] sorts the targets by
    response, and `response_offsets` [R + 1] is where each response's targets begin in that order.
    response_tokens int64 [R] counts each response's own tokens; pairs int64 [P, 2] index the row's
    responses; pair_weights, pair_margins and pair_betas float64 [P], NaN if the data has none;
    ranks int64 [R], labels and desirable float64 [R] and members int64 [S, K] as in MicroBatch;
    denominators are those of the step, None if the row is the whole step; ref_logps float64 [R] and
    ref_heads float64 [P, 2] are None if there is no reference; with several `references` they are
    those of the anchor. With `parts.heads`, head_order and
    head_offsets [2P + 1] are like those of responses, for the first tokens of each side of a pair.
    attributes float64 [R, A] and attribute_names are as in MicroBatch. slopes are, in the second
    pass over a step, the slope of the step's loss for each value of `response_scores`, float64;
    else None. With `params.share`, tokens and targets are those that this rank owns; responses,
    pairs and sets are always the whole row's.
    """

    tokens: Tensor
    params: TreePackedSeqParams
    response_order: Tensor
    response_offsets: Tensor
    response_tokens: Tensor
    pairs: Tensor
    pair_weights: Tensor
    pair_margins: Tensor
    ranks: Tensor
    labels: Tensor
    members: Tensor
    denominators: Mapping[str, float] | None
    is_divided: bool = False
    """Whether pairs or sets of the step lie in several rows: then only the step has a loss."""
    pair_betas: Tensor | None = None
    parts: ScoreParts = ScoreParts()
    head_order: Tensor | None = None
    head_offsets: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_heads: Tensor | None = None
    references: ReferenceColumns | None = None
    attributes: Tensor | None = None
    attribute_names: tuple[str, ...] = ()
    slopes: Tensor | None = None
    desirable: Tensor | None = None
    kl: Tensor | None = None
    images: RowPixels | None = None
    """None without images."""

    @property
    def num_scores(self) -> int:
        """Length of the vector that `response_scores` returns."""
        parts, num_responses = self.parts, len(self.response_tokens)
        times = 1 + (parts.num_labels if parts.num_labels > 1 else 0) + parts.alignments
        return times * num_responses + (2 * len(self.pairs) if parts.heads else 0)

    @property
    def model_inputs(self) -> dict[str, Any]:
        """What a model takes besides `tokens`, by name."""
        inputs = {"packed_seq_params": self.params}
        return inputs if self.images is None else {**inputs, "images": self.images}

    def with_kl(self, kl: Tensor) -> TrainBatch:
        """The same row with LossInputs.kl of its step, float64, 0-dimensional."""
        return replace(self, kl=kl)

    def with_slopes(self, slopes: Tensor) -> TrainBatch:
        return replace(self, slopes=slopes)

    def with_reference(self, ref_logps: Tensor, ref_heads: Tensor | None = None) -> TrainBatch:
        return replace(self, ref_logps=ref_logps, ref_heads=ref_heads)

    def with_several_references(self, references: ReferenceColumns) -> TrainBatch:
        heads, anchor = references.heads, references.anchor
        one = self.with_reference(
            references.logps[anchor], None if heads is None else heads[anchor]
        )
        return replace(one, references=references)

    def with_scales(self) -> TrainBatch:
        """The same row, for which the head also gives scales (see TreePackedSeqParams)."""
        return replace(self, params=replace(self.params, with_scales=True))

    def reference_scores(self, index: int | None = None) -> Tensor:
        """What the reference, or the one of several with this index, gives in the place of
        `response_scores`, float64; no alignments."""
        columns: list[Tensor | None] = [self.ref_logps, self.ref_heads]
        if index is not None and self.references is not None:
            several = self.references
            columns = [
                several.logps[index],
                None if several.heads is None else several.heads[index],
            ]
        parts = [x.flatten() for x in columns if x is not None]
        return torch.cat(parts)

    def for_reference(self) -> TrainBatch:
        """The same row without what is asked of the policy only."""
        if not self.parts.alignments:
            return self
        params = replace(self.params, with_collisions=False)
        return replace(self, params=params, parts=ScoreParts(heads=self.parts.heads))

    def loss_inputs(self, vector: Tensor) -> LossInputs:
        """The table that objectives read, with what the model computed of the row: the score of
        each response [R] and what `parts` adds."""
        scores, heads, alignments = self.parts.split(vector, len(self.response_tokens))
        has_pair = torch.zeros_like(self.labels)
        has_pair[self.pairs.flatten()] = 1.0
        weights = has_pair.new_zeros(len(self.members))
        if len(self.members):
            is_member = self.members >= 0
            weights = (has_pair[self.members.clamp(min=0)] * is_member).amax(dim=1)
        return LossInputs(
            scores=scores,
            ref_logps=self.ref_logps,
            num_tokens=self.response_tokens,
            pairs=self.pairs,
            margins=self.pair_margins,
            betas=self.pair_betas,
            pair_weights=self.pair_weights,
            ranks=self.ranks,
            labels=self.labels,
            desirable=self.desirable,
            kl=self.kl,
            members=self.members,
            set_weights=weights,
            heads=heads,
            ref_heads=self.ref_heads,
            references=self.references,
            attribute_scores=self.parts.attribute_scores(vector, len(self.response_tokens)),
            attributes=self.attributes,
            attribute_names=self.attribute_names,
            alignments=alignments,
        )

    def without_auxiliary(self) -> TrainBatch:
        """The same row without the auxiliary loss of experts."""
        return replace(self, params=replace(self.params, with_auxiliary=False))

    def with_step_count(self, step_count: float) -> TrainBatch:
        return replace(self, params=replace(self.params, step_count=step_count))


def to_device(
    batch: MicroBatch,
    device: torch.device,
    denominators: Mapping[str, float] | None = None,
    *,
    step_count: float = 0.0,
    share: ContextShare | None = None,
    parts: ScoreParts | None = None,
    pictures: PixelSource | None = None,
) -> TrainBatch:
    """Move a row, or this rank's part of it, to `device` and plan its attention, once for all
    layers. The host does not wait for copies from pinned memory to CUDA.

    `denominators` are those of the row's step; without them the row is the whole step.

    `parts` is what the objective needs of the model beside the score of each response.
    `step_count` is for an auxiliary loss of experts; see TreePackedSeqParams. `pictures` has the
    images of the row; only ranks after the first pipeline stage can run a row without them.
    """
    own = np.arange(len(batch.tokens)) if share is None else share.tokens
    is_own = np.isin(batch.logit_token, own)
    response = batch.response[is_own]
    # Tokens that predict several targets are projected once. Their indices in the row,
    # [2, 2, 5] of three targets, become the distinct [2, 5] and, per target, [0, 0, 1].
    logit_tokens, logit_of_target = np.unique(batch.logit_token[is_own], return_inverse=True)
    # Targets of the responses [1, 0, 1] -> order [1, 0, 2], offsets [0, 1, 3].
    order = np.argsort(response, kind="stable")
    counts = np.bincount(response, minlength=batch.num_responses)
    parts = parts or ScoreParts()
    heads = pair_heads(batch, is_own, order) if parts.heads else None
    served = None if batch.served is None else batch.served[own]
    axes, images = None, batch.images
    if images is not None and images.grids.any():
        axes = axis_positions(batch.layout, images.starts, images.lengths, images.grids)[:, own]

    tensor = partial(on_device, device=device)
    return TrainBatch(
        tokens=tensor(batch.tokens[own])[None],
        params=TreePackedSeqParams(
            plan=TreePlan(batch.layout, device) if share is None else share.plan,
            share=share,
            position_ids=tensor(batch.layout.position_ids()[own]),
            axes=None if axes is None else tensor(axes),
            logit_tokens=tensor(np.searchsorted(own, logit_tokens)),
            logit_of_target=tensor(logit_of_target),
            target_offsets=np.searchsorted(logit_of_target, np.arange(len(logit_tokens) + 1)),
            target_tokens=tensor(batch.target_token[is_own]),
            responses_served=None if served is None else tensor(served).float(),
            step_count=step_count,
            with_collisions=parts.alignments,
        ),
        response_order=tensor(order),
        response_offsets=tensor(np.concatenate([[0], np.cumsum(counts)])),
        response_tokens=tensor(batch.response_tokens),
        pairs=tensor(batch.pairs),
        pair_weights=tensor(batch.pair_weights),
        pair_margins=tensor(batch.pair_margins),
        ranks=tensor(batch.ranks),
        labels=tensor(batch.labels),
        members=tensor(batch.members),
        denominators=denominators,
        is_divided=batch.is_divided,
        pair_betas=None if batch.pair_betas is None else tensor(batch.pair_betas),
        parts=parts,
        attributes=None if batch.attributes is None else tensor(batch.attributes),
        attribute_names=batch.attribute_names,
        head_order=None if heads is None else tensor(heads[0]),
        head_offsets=None if heads is None else tensor(heads[1]),
        desirable=None if batch.desirable is None else tensor(batch.desirable),
        images=row_pixels(batch, own, pictures, device),
    )


def pair_heads(
    batch: MicroBatch, is_own: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The own targets in the head of each side of each pair, and where each side's begin [2P + 1].

    The head of a side is its first tokens, as many as the shorter side has. `order` sorts the own
    targets by response. Two responses with targets [0 2 4] and [1 3] are a pair: heads [0 2 | 1 3].
    """
    everywhere = np.argsort(batch.response, kind="stable")
    ends = np.cumsum(np.bincount(batch.response, minlength=batch.num_responses))
    place = np.empty(len(everywhere), np.int64)
    starts = np.repeat(ends - batch.response_tokens, batch.response_tokens)
    place[everywhere] = np.arange(len(everywhere)) - starts
    own_place, own_response = place[is_own][order], batch.response[is_own][order]
    firsts = np.searchsorted(own_response, np.arange(batch.num_responses + 1))
    heads: list[np.ndarray] = []
    for pair in batch.pairs:
        length = int(batch.response_tokens[pair].min())
        for response in pair:
            own = slice(firsts[response], firsts[response + 1])
            heads.append(order[own][own_place[own] < length])
    sizes = [len(head) for head in heads]
    joined = np.concatenate(heads) if heads else np.zeros(0, np.int64)
    return joined, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
