"""The images of a tree as values and as text, and those of a whole data set in numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.data.tokenize import Tokenizer
from megatron_prefix.data.tree import PrefixTree
from megatron_prefix.text import counted


def image_values(dataset: PreferenceDataset, tree: PrefixTree) -> list[dict[str, Any]]:
    """Each place of an image: its node, the node's token at which it begins, its tokens and its
    picture."""
    if tree.images is None or dataset.images is None:
        return []
    nodes = np.searchsorted(tree.node_offsets, tree.images.starts, "right") - 1
    return [
        {
            "node": int(node),
            "start": int(start - tree.node_offsets[node]),
            "tokens": int(length),
            "image": int(image),
            "size": dataset.images.sizes[image].tolist(),
            "sha256": dataset.images.hashes[image].tobytes().hex(),
        }
        for node, start, length, image in zip(
            nodes, tree.images.starts, tree.images.lengths, tree.images.ids, strict=True
        )
    ]


def image_cells(values: dict[str, Any]) -> list[str]:
    """An entry of `image_values` as a line of a table."""
    width, height = values["size"]
    return [
        f"  image {values['image']}",
        f"node {values['node']}",
        f"from token {values['start']:,}",
        counted(values["tokens"], "token"),
        f"{width:,} x {height:,} pixels",
        f"sha256 {values['sha256'][:12]}…",
    ]


def node_text(tree: PrefixTree, node: int, tokenizer: Tokenizer) -> str:
    """The text of a node with [image 3: 576 tokens] in place of the placeholders."""
    start, end = tree.node_offsets[node : node + 2].tolist()
    if tree.images is None:
        return tokenizer.decode(tree.tokens[start:end].tolist())
    parts, at = [], start
    inside = (tree.images.starts >= start) & (tree.images.starts < end)
    own = zip(*(x[inside].tolist() for x in _columns(tree)), strict=True)
    for first, length, image in own:
        parts.append(tokenizer.decode(tree.tokens[at:first].tolist()))
        parts.append(f"[image {image}: {counted(length, 'token')}]")
        at = first + length
    return "".join([*parts, tokenizer.decode(tree.tokens[at:end].tolist())])


def _columns(tree: PrefixTree) -> tuple[np.ndarray, ...]:
    assert tree.images is not None
    return tree.images.starts, tree.images.lengths, tree.images.ids


def survey_images(dataset: PreferenceDataset) -> dict[str, Any]:
    """Numbers about the images of a data set, for its survey; empty without images."""
    store = dataset.images
    if store is None:
        return {}
    described = store.described
    ends = np.cumsum(dataset.groups_num_tokens())
    groups = np.searchsorted(ends, store.occurrence_tokens, "right")
    return {
        **{name: described[name] for name in ("images", "occurrences", "tokens", "bytes")},
        "groups": len(np.unique(groups)),
        "family": described["processor"]["family"],
        "tokens_per_image": {
            "min": int(store.num_tokens.min()),
            "median": int(np.sort(store.num_tokens)[(len(store) - 1) // 2]),
            "max": int(store.num_tokens.max()),
        },
    }
