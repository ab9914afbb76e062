"""Floating-point operations of rows: what a perfect implementation would have to compute.

A multiply-add counts 2. Backward costs twice the forward pass. For a layer of hidden size C with
N query heads, G key/value heads of size H and feed-forward size F (gated):

    linear, a token      2 C (N + 2G) H  +  2 N H C  +  6 C F
    attention, an entry  4 N H           (scores and weighted sum, a visible (q, k) entry)
    head, a row          2 C V           (a reward model: 2 C)

With experts, 6 C F is that of the k experts of size F that each token is sent to, and the router of
E experts takes 2 C E.

The work of a bundle is read from the data set's columns alone, without its tokens. A node of n
tokens below d others has an area of n d + n (n + 1) / 2 visible (q, k) entries, a path of n tokens
n (n + 1) / 2. A tree with prompt [5, 6] and responses [7, 8] and [9] has 5 tokens, an area of
3 + (4 + 3) + (2 + 1) = 13, and predicts from tokens 6 and 7: 2 rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_prefix.config import ModelSizes
from megatron_prefix.data.steps.sharing import Bundle
from megatron_prefix.data.store.dataset import PreferenceDataset


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Operations of one forward pass as a sum over what a row holds, see this module's head."""

    per_token: float
    """FLOP a token executed: the linear layers."""
    per_entry: float
    """FLOP a visible (q, k) entry: attention."""
    per_row: float
    """FLOP a row of logits: the head."""

    @classmethod
    def of_model(cls, sizes: ModelSizes, vocab_size: int, kind: str = "lm") -> CostModel:
        """The constants of a language model, or of a reward model with `kind="reward"`."""
        heads, groups = sizes.num_attention_heads, sizes.num_query_groups
        width, head_dim = sizes.hidden_size, sizes.kv_channels
        layer = 2 * width * (heads + 2 * groups) * head_dim + 2 * heads * head_dim * width
        if sizes.num_moe_experts:
            expert = 6 * width * sizes.moe_ffn_hidden_size
            layer += sizes.moe_router_topk * expert + 2 * width * sizes.num_moe_experts
        else:
            layer += 6 * width * sizes.ffn_hidden_size
        columns = 1 if kind == "reward" else vocab_size
        return cls(
            per_token=float(sizes.num_layers * layer),
            per_entry=float(sizes.num_layers * 4 * heads * head_dim),
            per_row=float(2 * width * columns),
        )


class Work(NamedTuple):
    """Tokens executed, visible (q, k) entries, rows that become logits."""

    tokens: int
    area: int
    rows: int

    def cost(self, model: CostModel | None) -> float:
        """FLOP of a forward pass; without a model, tokens."""
        if model is None:
            return float(self.tokens)
        return (
            model.per_token * self.tokens + model.per_entry * self.area + model.per_row * self.rows
        )


def bundle_work(dataset: PreferenceDataset, bundle: Bundle, sharing: str) -> Work:
    """The work of one bundle under a sharing mode."""
    if sharing == "tree":
        return _tree_work(dataset, bundle.group)
    r0, r1 = (int(x) for x in dataset.group_responses[bundle.group : bundle.group + 2])
    lengths = np.array(dataset.response_lengths[r0:r1], np.int64)
    prompts = np.array(dataset.response_prompts[r0:r1], np.int64)
    if sharing == "response":
        chosen = np.flatnonzero(dataset.response_sets[r0:r1] == bundle.item)
    else:
        chosen = dataset.pair_responses[int(dataset.group_pairs[bundle.group]) + bundle.item]
    lengths, prompts = lengths[chosen], prompts[chosen]
    tokens, area = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    rows = int((lengths - prompts).sum())
    if sharing == "pair":
        shared = int(prompts.min())
        tokens, area = tokens - shared, area - shared * (shared + 1) // 2
        rows -= int(prompts[0] == prompts[1])  # both first tokens are predicted by one row
    return Work(tokens, area, rows)


def _tree_work(dataset: PreferenceDataset, group: int) -> Work:
    m0, m1 = (int(x) for x in dataset.group_nodes[group : group + 2])
    r0, r1 = (int(x) for x in dataset.group_responses[group : group + 2])
    lengths, parents = dataset.node_lengths[m0:m1].tolist(), dataset.node_parents[m0:m1].tolist()
    ends, area = [], 0
    for length, parent in zip(lengths, parents, strict=True):
        above = ends[parent] if parent >= 0 else 0
        ends.append(above + length)
        area += length * above + length * (length + 1) // 2
    own: set[int] = set()
    first, last = dataset.response_first[r0:r1].tolist(), dataset.response_last[r0:r1].tolist()
    for top, node in zip(first, last, strict=True):
        while node != top:
            own.add(node)
            node = parents[node]
        own.add(top)
    rows = sum(lengths[node] - 1 for node in own) + len({parents[node] for node in own})
    return Work(sum(lengths), area, rows)
