"""Cost of rows in floating-point operations (FLOP), as a perfect implementation needs them.

A multiply-add counts 2. Backward costs twice the forward pass. For a layer of hidden size C with
N query heads, G key/value heads of size H and feed-forward size F (gated):

    linear layers, per token      2 C (N + 2G) H  +  2 N H C  +  6 C F
    attention, per (q, k) entry   4 N H           (scores and weighted sum)
    head, per logit token         2 C V           (V the vocabulary; a reward model: 2 C)

With a sliding window a token has at most as many entries as the window. Layers may differ, and an
area is the mean of the layers.
Without a gate, 6 C F is 4 C F.

A logit token is one whose logits are computed. With experts, 6 C F counts once for each of the k
experts (of size F) that a token is sent to and for a shared expert, and the router of E experts
takes 2 C E. Only the layers that have experts count them.

Multi-latent attention has other matrices (config/parts/latent.py), 2 FLOP for each weight, and
with values of V channels 2 N (H + V) per entry. Zeros that are filled up are not counted.

A picture takes what config/parts/tower.py says.

The work of a bundle is read from the data set's columns alone, without its tokens. A node of n
tokens below d others has an area of n d + n (n + 1) / 2 visible (q, k) entries, a path of n tokens
n (n + 1) / 2. A tree with prompt [5, 6] and responses [7, 8] and [9] has 5 tokens, an area of
3 + (4 + 3) + (2 + 1) = 13, and predicts from tokens 6 and 7: 2 logit tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from megatron_prefix.config import ModelSizes
from megatron_prefix.config.parts import PictureWork
from megatron_prefix.data.steps.sharing import Bundle, bundle_parts
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.layout import visible_entries


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Operations of one forward pass over a row; this module's head has the formulas."""

    per_token: float
    """FLOP per token of the row: the linear layers."""
    per_entry: float
    """FLOP per visible (q, k) entry: attention."""
    per_logit_token: float
    """FLOP per token whose logits are computed: the head."""
    windows: Mapping[int | None, float] = field(default_factory=lambda: {None: 1})
    """Share of the layers that have each sliding window, in tokens; None: without a window."""
    per_picture: tuple[float, ...] = ()
    """FLOP of each picture of the data set, before the language model."""

    def area(self, first_positions: np.ndarray, lengths: np.ndarray) -> float:
        """Visible (q, k) entries of segments in the mean of the layers; see `visible_entries`."""
        return sum(
            share * visible_entries(first_positions, lengths, window)
            for window, share in self.windows.items()
        )

    @classmethod
    def of_model(cls, sizes: ModelSizes, vocab_size: int, kind: str = "lm") -> CostModel:
        """The constants of a language model, or of a reward model with `kind="reward"`."""
        heads, groups = sizes.num_attention_heads, sizes.num_query_groups
        width, head_dim = sizes.hidden_size, sizes.kv_channels
        parts, mixtures = sizes.architecture, sizes.expert_layers
        # width 4, 2 heads of 2, 1 group, feed-forward size 8: 64 for queries, keys and values, 32
        # for the output, 192 for the feed-forward layer
        attention = 2 * width * (heads + 2 * groups) * head_dim + 2 * heads * head_dim * width
        channels = 2 * head_dim
        if (latent := parts.latent) is not None:
            attention = 2 * sum(latent.matrices(width, heads))
            channels = head_dim + latent.value_channels
        linear = sizes.num_layers * attention
        if mixtures:
            expert = 6 * width * sizes.moe_ffn_hidden_size
            experts = sizes.moe_router_topk * expert + 2 * width * sizes.num_moe_experts
            linear += mixtures * (experts + 6 * width * parts.shared_expert_size)
        matrices = 3 if parts.gated_linear_unit else 2
        linear += (sizes.num_layers - mixtures) * 2 * matrices * width * sizes.ffn_hidden_size
        columns = 1 if kind == "reward" else vocab_size
        return cls(
            per_token=float(linear),
            per_entry=float(sizes.num_layers * 2 * heads * channels),
            per_logit_token=float(2 * width * columns),
            windows={w: n / sizes.num_layers for w, n in Counter(sizes.windows).items()},
        )

    def with_pictures(
        self,
        works: Sequence[PictureWork],
        *,
        freezes_tower: bool = False,
        freezes_projector: bool = False,
    ) -> CostModel:
        """The same costs with those of each picture of the data set.

        Costs are forward passes of the language model, which is computed three times in training.
        What is frozen there is computed once, so it counts a third.
        """
        tower, projector = (
            1 / 3 if is_frozen else 1.0 for is_frozen in (freezes_tower, freezes_projector)
        )
        pictures = tuple(tower * work.tower + projector * work.projector for work in works)
        return replace(self, per_picture=pictures)


WITHOUT_WINDOWS = CostModel(per_token=0.0, per_entry=0.0, per_logit_token=0.0)


class Work(NamedTuple):
    """Tokens, visible (q, k) entries in the mean of the layers, tokens whose logits are
    computed."""

    tokens: int
    area: float
    logit_tokens: int
    pictures: float = 0.0
    """FLOP of its pictures, before the language model."""

    def cost(self, model: CostModel) -> float:
        """FLOP of a forward pass."""
        return (
            model.per_token * self.tokens
            + model.per_entry * self.area
            + model.per_logit_token * self.logit_tokens
            + self.pictures
        )


def bundle_work(
    dataset: PreferenceDataset, bundle: Bundle, sharing: str, model: CostModel = WITHOUT_WINDOWS
) -> Work:
    """The work of one bundle under a sharing mode, for the sliding windows of `model`."""
    work = _token_work(dataset, bundle, sharing, model)
    if model.per_picture and (images := dataset[bundle.group].images) is not None:
        # each sequence of a bundle that shares nothing encodes the pictures of its prompt
        is_shared = sharing == "tree" or (sharing == "pair" and bundle.part is None)
        times = 1 if is_shared else len(bundle_parts(dataset, bundle, sharing)[0])
        once = sum(model.per_picture[image] for image in np.unique(images.ids))
        work = work._replace(pictures=times * once)
    return work


def _token_work(dataset: PreferenceDataset, bundle: Bundle, sharing: str, model: CostModel) -> Work:
    if sharing == "tree":
        return _tree_work(dataset, bundle, model)
    chosen, _ = bundle_parts(dataset, bundle, sharing)
    r0, r1 = (int(x) for x in dataset.group_responses[bundle.group : bundle.group + 2])
    lengths = np.array(dataset.response_lengths[r0:r1], np.int64)[chosen]
    prompts = np.array(dataset.response_prompts[r0:r1], np.int64)[chosen]
    # A pair of 5 and 4 tokens with a prompt of 3: apart 9 tokens, an area of 15 + 10 and 2 + 1
    # logit tokens. With the prompt once 6 tokens, an area of 25 - 6, and one logit token less,
    # because token 2 predicts the first token of both responses.
    tokens, area = int(lengths.sum()), model.area(np.zeros_like(lengths), lengths)
    logit_tokens = int((lengths - prompts).sum())
    if sharing == "pair" and bundle.part is None:
        shared = int(prompts.min())
        tokens, area = tokens - shared, area - model.area(np.zeros(1), np.array([shared]))
        logit_tokens -= int(prompts[0] == prompts[1])  # one token predicts both first tokens
    return Work(tokens, area, logit_tokens)


def _tree_work(dataset: PreferenceDataset, bundle: Bundle, model: CostModel) -> Work:
    m0, m1 = (int(x) for x in dataset.group_nodes[bundle.group : bundle.group + 2])
    r0 = int(dataset.group_responses[bundle.group])
    lengths, parents = dataset.node_lengths[m0:m1].tolist(), dataset.node_parents[m0:m1].tolist()
    responses = bundle_parts(dataset, bundle, "tree")[0] + r0
    first, last = (
        np.asarray(column)[responses].tolist()
        for column in (dataset.response_first, dataset.response_last)
    )
    ends: list[int] = []  # tokens from the root to each node's end
    for length, parent in zip(lengths, parents, strict=True):
        ends.append((ends[parent] if parent >= 0 else 0) + length)
    nodes = slice(None) if bundle.part is None else _nodes_above(last, parents)
    own_lengths = np.array(lengths)[nodes]
    area = model.area(np.array(ends)[nodes] - own_lengths, own_lengths)
    # Own nodes of all responses, from the last node up to the first. Responses may share some:
    # prompt [5] with [7 8] and [7 9] has the own nodes [7], [8] and [9], and [7] counts once.
    own: set[int] = set()
    for top, node in zip(first, last, strict=True):
        while node != top:
            own.add(node)
            node = parents[node]
        own.add(top)
    # Within a node with loss every token but the last predicts the next one. The last token of a
    # parent predicts the first token of all its children with loss, and counts once.
    logit_tokens = sum(lengths[node] - 1 for node in own) + len({parents[node] for node in own})
    return Work(int(own_lengths.sum()), area, logit_tokens)


def _nodes_above(lasts: list[int], parents: list[int]) -> list[int]:
    """The nodes on the paths to `lasts`, ascending: parents come before their children."""
    nodes: set[int] = set()
    for node in lasts:
        while node >= 0 and node not in nodes:
            nodes.add(node)
            node = parents[node]
    return sorted(nodes)
