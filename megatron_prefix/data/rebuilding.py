"""PrefixTree -> its token paths, and back: for trees that are merged, extended or cut again.

While this lasts, the placeholder tokens of images are -1 - image (tree_images.py), so that other
images are other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_prefix.data.tree import Pair, PrefixTree, ResponsePath, build_tree
from megatron_prefix.data.tree_images import Placed, known_images, occurrences, place, unplaced


def bare(tree: PrefixTree) -> PrefixTree:
    """The tree with every image as tokens of its own, and no `images`."""
    images = tree.images
    if images is None:
        return tree
    tokens = unplaced(tree.tokens, images.starts, images.lengths, images.ids)
    return replace(tree, tokens=tokens, images=None)


def prompt_images(tree: PrefixTree) -> tuple[Placed, ...]:
    """The images before the first response's own tokens, in order."""
    if tree.images is None:
        return ()
    known = known_images([tree.images])
    tokens, loss_start = bare(tree).response_tokens(0)
    _, ids = occurrences(tokens[:loss_start], {n: x.num_tokens for n, x in known.items()})
    return tuple(known[int(image)] for image in ids)


def with_images(tree: PrefixTree, sources: Sequence[PrefixTree]) -> PrefixTree:
    """A bare tree as it is stored; its images are those of `sources`."""
    known = [source.images for source in sources if source.images is not None]
    if not known:
        return tree
    placeholder = next((_placeholder(source) for source in sources if source.images), 0)
    tokens, images = place(tree.tokens, placeholder, known_images(known))
    return replace(tree, tokens=tokens, images=images)


def _placeholder(tree: PrefixTree) -> int:
    assert tree.images is not None
    return int(tree.tokens[tree.images.starts[0]])


def tree_paths(tree: PrefixTree) -> tuple[list[ResponsePath], list[Pair]]:
    """The responses and pairs that `build_tree` made a tree of, with bare tokens."""
    paths, tree = [], bare(tree)
    for response in range(tree.num_responses):
        tokens, loss_start = tree.response_tokens(response)
        paths.append(
            ResponsePath(
                tokens=tokens,
                loss_start=loss_start,
                set_id=int(tree.response_sets[response]),
                rank=int(tree.ranks[response]),
                score=float(tree.scores[response]),
            )
        )
    numbers = np.stack([tree.pair_weights, tree.pair_margins, tree.pair_betas], axis=1).tolist()
    pairs = [
        Pair(chosen=chosen, rejected=rejected, weight=weight, margin=margin, beta=beta)
        for (chosen, rejected), (weight, margin, beta) in zip(
            tree.pairs.tolist(), numbers, strict=True
        )
    ]
    return paths, pairs


def rebuilt(
    responses: Sequence[ResponsePath], pairs: Sequence[Pair], sources: Sequence[PrefixTree]
) -> PrefixTree:
    """`build_tree` of bare paths that are those of `sources`, or have their images."""
    return with_images(build_tree(responses, pairs), sources)
