"""How tokens choose experts, in families where it is not a softmax over the chosen ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_prefix.config.bounds import KNOWN_KEYS, Heads, Positive, Switch


@dataclass(kw_only=True, frozen=True, config=KNOWN_KEYS)
class Routing:
    """The choice of experts of DeepSeek-V2 (`softmax`, arXiv 2405.04434, section 2.2) and V3
    (`sigmoid`, arXiv 2412.19437, section 2.1.2)."""

    score: Literal["softmax", "sigmoid"]
    """An expert's weight is its score; with `sigmoid` a correction bias per expert is added for
    the choice, and only for it. The bias is not trained."""
    groups: Heads = 1
    """Groups of experts. A token goes only to the `chosen_groups` whose best expert (`softmax`), or
    sum of the best two (`sigmoid`), is highest."""
    chosen_groups: Heads = 1
    normalised: Switch = False
    """The weights of the chosen experts are divided by their sum."""
    factor: Positive = 1.0
    """What weights are multiplied by at last."""

    def faults(self, experts: int, topk: int) -> Iterator[str]:
        """Groups that the experts do not fill."""
        groups, chosen = self.groups, self.chosen_groups
        if experts % groups or chosen > groups:
            yield f"{experts} experts in n_group = {groups}, of which topk_group = {chosen}"
        elif topk > experts // groups * chosen:
            yield (
                f"num_experts_per_tok = {topk} is above the experts of topk_group = {chosen} of "
                f"n_group = {groups} groups of {experts // groups}"
            )
        elif self.score == "sigmoid" and experts // groups < 2:
            yield f"n_group = {groups} groups of {experts} experts need at least two in each"
