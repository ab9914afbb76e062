"""Blocks: many groups at once as the columns of a data set. Builders make them, the writer appends
them.

Two groups, the first with 3 nodes and 2 responses, the second with 2 nodes and 1 response:

    group_nodes [3, 2]    group_responses [2, 1]    node_parents [-1, 0, 0, -1, 0]

Three columns are offsets on disk and counts per group here; all other columns are as on disk. Shape
suffixes: G groups, M nodes, R responses, P pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from megatron_prefix.data.images import ImageStore, PictureTable, StoredPicture
from megatron_prefix.data.store.columns import column
from megatron_prefix.data.tree import MergedPaths, PrefixTree, joined
from megatron_prefix.data.tree_images import occurrences, unplaced


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockImages:
    """The images in the tokens of a block: int64 arrays of O occurrences, in order of tokens.

    `starts` [O] are the tokens of the block at which they begin, `ids` [O] places in `pictures`;
    `processor` describes the image processor that counted their tokens.
    """

    starts: np.ndarray
    ids: np.ndarray
    pictures: Sequence[StoredPicture]
    processor: Mapping[str, Any]

    @property
    def lengths(self) -> np.ndarray:
        """Placeholder tokens of each occurrence, int64 [O]."""
        return np.array([self.pictures[place].num_tokens for place in self.ids], np.int64)

    def within(self, is_kept_T: np.ndarray) -> BlockImages:
        """The images of the kept tokens, by their new numbers."""
        kept = is_kept_T[self.starts]
        numbers = np.cumsum(is_kept_T, dtype=np.int64) - 1
        return replace(self, starts=numbers[self.starts[kept]], ids=self.ids[kept])

    @classmethod
    def of_store(cls, starts_O: np.ndarray, ids_O: np.ndarray, store: ImageStore) -> BlockImages:
        """Occurrences of the images of a data set, `ids_O` by their numbers there."""
        numbers, places = np.unique(ids_O, return_inverse=True)
        pictures = [store.stored(int(number)) for number in numbers]
        return cls(starts=starts_O, ids=places, pictures=pictures, processor=store.processor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """tokens_T, node_lengths_M (tokens), and the columns by name; optional ones may be absent."""

    tokens: np.ndarray
    node_lengths: np.ndarray
    columns: dict[str, np.ndarray]
    images: BlockImages | None = None
    """None without images."""

    @property
    def num_groups(self) -> int:
        return len(self.columns["group_nodes"])

    @property
    def bare_tokens(self) -> np.ndarray:
        """The tokens with -1 - place of its picture for every placeholder of an image."""
        images = self.images
        if images is None:
            return self.tokens
        return unplaced(self.tokens, images.starts, images.lengths, images.ids)

    @classmethod
    def of_paths(
        cls,
        groups: Sequence[MergedPaths],
        records: Sequence[int],
        table: PictureTable | None = None,
    ) -> Block:
        """A block of merged paths; group i is made of the one input record `records[i]`. The paths
        are bare if there is a table."""
        arrays = joined(groups)
        images = None if table is None else _images_of(arrays, table)
        block = cls._of(
            arrays,
            lengths=np.diff(arrays["node_offsets"]),
            counts=[(len(g.parents), len(g.responses), len(g.pairs)) for g in groups],
            records=[(record, 1) for record in records],
            images=images,
        )
        attributes = np.array([r.attributes for g in groups for r in g.responses], np.float64)
        if attributes.shape[1]:
            block.columns["response_attributes"] = attributes
        return block

    @classmethod
    def of_trees(
        cls,
        trees: Sequence[PrefixTree],
        records: Sequence[tuple[int, int]],
        store: ImageStore | None = None,
    ) -> Block:
        """A block of trees; group i begins at input record `records[i][0]` and holds
        `records[i][1]` records. `store` has the images of the trees."""
        others = ("node_offsets", "images")
        names = [field.name for field in fields(PrefixTree) if field.name not in others]
        images = None
        if store is not None:
            firsts = starts(np.array([tree.num_tokens for tree in trees]))
            own = [
                (tree.images.starts + first, tree.images.ids)
                for tree, first in zip(trees, firsts, strict=True)
                if tree.images is not None
            ]
            places, ids = (np.concatenate([part[i] for part in own]) for i in (0, 1))
            images = BlockImages.of_store(places, ids, store)
        return cls._of(
            {name: np.concatenate([getattr(tree, name) for tree in trees]) for name in names},
            lengths=np.concatenate([np.diff(tree.node_offsets) for tree in trees]),
            counts=[(len(t.parents), len(t.response_last), len(t.pairs)) for t in trees],
            records=records,
            images=images,
        )

    @classmethod
    def _of(
        cls,
        arrays: dict[str, np.ndarray],
        lengths: np.ndarray,
        counts: Sequence[tuple[int, int, int]],
        records: Sequence[tuple[int, int]],
        images: BlockImages | None,
    ) -> Block:
        """From concatenated arrays of trees; `counts` are nodes, responses and pairs per group."""
        nodes, responses, pairs = np.array(counts).T
        first_records, num_records = np.array(records, np.int64).T
        columns = {
            "group_nodes": nodes,
            "group_responses": responses,
            "group_pairs": pairs,
            "group_records": first_records,
            "group_num_records": num_records,
            "node_parents": arrays["parents"],
            "response_first": arrays["response_first"],
            "response_last": arrays["response_last"],
            "response_sets": arrays["response_sets"],
            "response_ranks": arrays["ranks"],
            "response_scores": arrays["scores"],
            "pair_responses": arrays["pairs"],
            "pair_weights": arrays["pair_weights"],
            "pair_margins": arrays["pair_margins"],
        }
        # Groups of 3 and 2 nodes with 2 and 1 responses: first_nodes [0 0 3]. The last nodes
        # [1 2 | 1] of the responses, which count within their group, are the nodes [1 2 4] of the
        # block.
        ends = node_ends(lengths, arrays["parents"], nodes)
        first_nodes = np.repeat(starts(nodes), responses)
        first, last = (first_nodes + columns[f"response_{end}"] for end in ("first", "last"))
        columns["response_lengths"] = ends[last]
        columns["response_prompts"] = ends[first] - lengths[first]
        if not np.isnan(arrays["pair_betas"]).all():
            columns["pair_betas"] = arrays["pair_betas"]
        columns = {name: np.asarray(x, column(name).dtype) for name, x in columns.items()}
        return cls(
            tokens=_narrow(arrays["tokens"]),
            node_lengths=lengths.astype("<i4"),
            columns=columns,
            images=images,
        )


def _images_of(arrays: dict[str, np.ndarray], table: PictureTable) -> BlockImages | None:
    """The images of bare tokens, which become those that are stored; None if there are none."""
    bare = arrays["tokens"]
    if bare.min() >= 0:
        return None
    lengths = {place: picture.num_tokens for place, picture in enumerate(table.pictures)}
    places, ids = occurrences(bare, lengths)
    arrays["tokens"] = np.where(bare < 0, table.placeholder, bare)
    return BlockImages(starts=places, ids=ids, pictures=table.pictures, processor=table.processor)


def _narrow(tokens: np.ndarray) -> np.ndarray:
    """As uint16 if all ids fit, because blocks are sent between processes."""
    fits = 0 <= tokens.min() and tokens.max() < 1 << 16
    return tokens.astype(np.uint16) if fits else tokens


def starts(counts: np.ndarray) -> np.ndarray:
    """[3, 2, 4] -> [0, 3, 5], int64."""
    return np.cumsum(counts, dtype=np.int64) - counts


def node_ends(lengths_M: np.ndarray, parents_M: np.ndarray, counts_G: np.ndarray) -> np.ndarray:
    """Tokens from the root to each node's end, int64 [M]; parents count from the group's first.

    A chain of nodes with lengths [3, 2, 4, 1] and parents [-1, 0, 1, 2]:

        ends      3 2 4 1    above  root 0 1 2         each node alone
        ends      3 5 6 5    above  root root 0 1      with its parent
        ends      3 5 9 10   above  root root root root

    Each round adds the ends of the node above, and then looks twice as far up. A tree of depth d
    takes log2 d rounds, each of the nodes that are not yet at a root.
    """
    ends = np.array(lengths_M, np.int64)
    above = np.repeat(starts(counts_G), counts_G) + parents_M
    above[parents_M < 0] = -1
    node = np.flatnonzero(above >= 0)
    while len(node):
        up = above[node]
        ends[node] += ends[up]
        above[node] = up = above[up]
        node = node[up >= 0]
    return ends
