"""Rows of token sequences whose next token is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_prefix.data.steps.collate import MicroBatch, RowItem, collate_packed
from megatron_prefix.data.steps.sharing import View
from megatron_prefix.data.tree import ResponsePath, build_tree


def open_rows(
    sequences: Sequence[Sequence[int]], capacity: int, multiple: int, count_multiple: int
) -> list[MicroBatch]:
    """Sequences in their order, in rows of at most `capacity` tokens if none is longer; row lengths
    in multiples of `multiple`, and empty rows up to a multiple of rows.

    Each sequence has one more token, which counts as its only response: what matters are the logits
    of the token before it, and no other token sees it. Lengths 3, 4 and 2 need 4, 5 and 3 tokens:
    in rows of 10 they are [3 4] and [2].
    """
    rows: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        needed = len(sequence) + 1
        if not rows or needed > room:
            rows.append([])
            room = capacity
        rows[-1].append(sequence)
        room -= needed
    rows += [[] for _ in range(-len(rows) % count_multiple)]
    return [collate_packed([*map(_item, row)], multiple) for row in rows]


def _item(sequence: Sequence[int]) -> RowItem:
    tokens = np.array([*sequence, 0], np.int64)
    path = ResponsePath(tokens=tokens, loss_start=len(sequence), set_id=0)
    nothing = np.zeros(0, np.int64)
    view = View(tree=build_tree([path], []), responses=np.zeros(1, np.int64), pairs=nothing)
    return RowItem(group=0, view=view, pair_weights=np.zeros(0))
