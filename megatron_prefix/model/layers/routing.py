"""The choice of experts of DeepSeek-V2 and V3; config/parts/routing.py has its settings.

Shapes: T tokens, E experts, g groups of experts, k experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prefix.config.parts import Routing


def scores_of(logits_TE: Tensor, routing: Routing) -> Tensor:
    """Scores of all experts, of which a token's weights are made, [T, E]."""
    return logits_TE.softmax(dim=-1) if routing.score == "softmax" else logits_TE.sigmoid()


def choose_experts(
    scores_TE: Tensor, topk: int, routing: Routing, correction_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The chosen experts' weights [T, E], 0 for the others, and which are chosen.

    4 experts in 2 groups, of which one is chosen, sigmoid scores [0.9 0.1 0.6 0.5]: the sums of
    the best two are 1.0 and 1.1, so experts 2 and 3 are chosen, though 0 has the highest score.
    """
    choice_TE = scores_TE.detach()
    if correction_E is not None:
        choice_TE = choice_TE + correction_E
    if routing.groups > 1:
        by_group = choice_TE.unflatten(1, (routing.groups, -1))
        best = 1 if routing.score == "softmax" else 2
        group_scores = by_group.topk(best, dim=-1).values.sum(-1)
        chosen_groups = group_scores.topk(routing.chosen_groups, dim=-1).indices
        is_chosen = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, chosen_groups, True)
        choice_TE = by_group.masked_fill(~is_chosen.unsqueeze(-1), float("-inf")).flatten(1)
    indices_Tk = choice_TE.topk(topk, dim=-1).indices
    weights_Tk = scores_TE.gather(1, indices_Tk)
    if routing.normalised:
        weights_Tk = weights_Tk / (weights_Tk.sum(dim=-1, keepdim=True) + 1e-20)
    weights_Tk = weights_Tk * routing.factor
    empty = torch.zeros_like(scores_TE)
    chosen_TE = torch.zeros_like(empty, dtype=torch.bool).scatter(1, indices_Tk, True)
    return empty.scatter(1, indices_Tk, weights_Tk), chosen_TE
