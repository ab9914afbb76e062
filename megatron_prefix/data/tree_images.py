"""Images in the tokens of a tree: where each begins, and which it is.

An image is a run of placeholder tokens. While a tree is built, each of them is -1 - image instead:
so paths whose images differ share nothing of them, and no node can end inside one.

    stored     [5, 9, 9, 9, 7]     placeholder 9, image 4 of 3 tokens: starts [1], ids [4]
    unplaced   [5, -5, -5, -5, 7]

Shapes: T tokens, O occurrences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class TreeImages:
    """The images of one tree, in order of tokens. int64 arrays."""

    starts: np.ndarray
    """[O]: the token of the tree at which an occurrence begins."""
    lengths: np.ndarray
    """[O]: its placeholder tokens."""
    ids: np.ndarray
    """[O]: which image it is."""
    grids: np.ndarray
    """[O, 3]: its time, height and width in tokens; zeros if positions have one axis."""

    def __len__(self) -> int:
        return len(self.starts)

    def within(self, is_kept_T: np.ndarray) -> TreeImages:
        """The images of the kept tokens, by their new numbers; an image is kept whole or not."""
        kept = is_kept_T[self.starts]
        numbers = np.cumsum(is_kept_T, dtype=np.int64) - 1
        return TreeImages(
            starts=numbers[self.starts[kept]],
            lengths=self.lengths[kept],
            ids=self.ids[kept],
            grids=self.grids[kept],
        )


NO_IMAGES = TreeImages(
    starts=np.zeros(0, np.int64),
    lengths=np.zeros(0, np.int64),
    ids=np.zeros(0, np.int64),
    grids=np.zeros((0, 3), np.int64),
)
"""Of a tree without images, in a data set with some."""


class Placed(NamedTuple):
    """How an image is written as tokens."""

    image: int
    num_tokens: int
    grid: tuple[int, int, int] = (0, 0, 0)


def placeholders(starts_O: np.ndarray, lengths_O: np.ndarray) -> np.ndarray:
    """The tokens of all occurrences: starts [1, 7] and lengths [3, 2] -> [1, 2, 3, 7, 8]."""
    firsts = np.cumsum(lengths_O) - lengths_O
    within = np.arange(int(lengths_O.sum())) - np.repeat(firsts, lengths_O)
    return np.repeat(starts_O, lengths_O) + within


def unplaced(
    tokens_T: np.ndarray, starts_O: np.ndarray, lengths_O: np.ndarray, ids_O: np.ndarray
) -> np.ndarray:
    """The tokens with -1 - image in place of every placeholder."""
    tokens = np.array(tokens_T, np.int64)
    tokens[placeholders(starts_O, lengths_O)] = np.repeat(-1 - ids_O, lengths_O)
    return tokens


def occurrences(tokens_T: np.ndarray, num_tokens: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ids) of the images in unplaced tokens; `num_tokens` are those of each image.

    Twice image 0 of 2 tokens, then image 3 of 1:  [-1 -1 -1 -1 7 -4] -> [0, 2, 5], [0, 0, 3].
    """
    places = np.flatnonzero(tokens_T < 0)
    ids = -1 - tokens_T[places]
    # A run ends where the next placeholder is not the next token, or is another image's.
    is_first = np.ones(len(places), bool)
    is_first[1:] = (np.diff(places) > 1) | (np.diff(ids) != 0)
    firsts = np.flatnonzero(is_first)
    runs = np.diff(np.append(firsts, len(places)))
    lengths = np.array([num_tokens[int(image)] for image in ids[firsts]], np.int64)
    assert not (runs % np.maximum(lengths, 1)).any(), "an image was cut by a node's end"
    counts = runs // np.maximum(lengths, 1)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(places[firsts], counts) + within * np.repeat(lengths, counts)
    return starts.astype(np.int64), np.repeat(ids[firsts], counts).astype(np.int64)


def place(
    tokens_T: np.ndarray, placeholder: int, images: dict[int, Placed]
) -> tuple[np.ndarray, TreeImages]:
    """Unplaced tokens as they are stored, and where their images are."""
    starts, ids = occurrences(tokens_T, {n: about.num_tokens for n, about in images.items()})
    grids = np.array([images[int(n)].grid for n in ids], np.int64).reshape(-1, 3)
    lengths = np.array([images[int(n)].num_tokens for n in ids], np.int64)
    return np.where(tokens_T < 0, placeholder, tokens_T), TreeImages(
        starts=starts, lengths=lengths, ids=ids, grids=grids
    )


def known_images(trees: Iterable[TreeImages | None]) -> dict[int, Placed]:
    """How each image of some trees is written as tokens."""
    return {
        int(image): Placed(int(image), int(length), tuple(grid))
        for images in trees
        if images is not None
        for image, length, grid in zip(
            images.ids, images.lengths, images.grids.tolist(), strict=True
        )
    }
