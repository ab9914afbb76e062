"""Parts: a bundle that does not fit a row, cut along its branches (`data.oversized: split`).

Responses are taken in depth-first order. Each goes to the current part, if the tokens that it adds
still fit, or begins the next part. A part is all root paths of its responses, so it repeats the
prefix that they share with other parts. A response's own tokens have their loss in one part only.

    nodes    0 [5 tokens]   1 [3]   2 [2]   3 [4]   4 [1]
    parents  -1             0       1       1       0
    responses end in nodes 1, 2, 3 and 4; a row holds 12 tokens

    response 0 takes 5 + 3 = 8 tokens, response 1 adds 2: part (0, 1) of 10 tokens
    response 2 would add 4. It begins a part: 5 + 3 + 4 = 12 tokens, 8 of them repeated: part (2)
    response 3 would add 1. It begins a part: 5 + 1 = 6 tokens, 5 of them repeated: part (3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """Some responses of a bundle, as indices into the group's."""

    responses: tuple[int, ...]
    num_tokens: int
    repeated: int
    """Tokens that a part before it has too."""


@dataclass(frozen=True)
class Limits:
    """The largest bundle: tokens, and sequences of a micro batch. None: no limit."""

    tokens: int | None = None
    sequences: int | None = None

    @classmethod
    def of(
        cls, oversized: str, sharing: str, row_capacity: int | None, micro_batch_size: int | None
    ) -> Limits:
        """The limits of a run: what the `data` section says. Without packing, `row_capacity` bounds
        one sequence, and a path is never cut."""
        if oversized != "split":
            return cls()
        if micro_batch_size is not None and sharing in ("none", "response"):
            return cls(sequences=micro_batch_size)
        return cls(tokens=row_capacity)

    def allow(self, num_tokens: int, num_sequences: int) -> bool:
        """Whether a bundle of this size may stay whole."""
        return not (
            (self.tokens is not None and num_tokens > self.tokens)
            or (self.sequences is not None and num_sequences > self.sequences)
        )


def cut_tree(
    node_lengths: Sequence[int], parents: Sequence[int], lasts: Sequence[int], capacity: int
) -> list[Part]:
    """The parts of a tree: `lasts` are the nodes in which its responses end.

    A part of one response may still exceed `capacity`: a path is never cut.
    """
    parts: list[Part] = []
    seen: set[int] = set()  # nodes of the parts before
    nodes: set[int] = set()  # nodes of the current part
    responses: list[int] = []
    tokens = 0

    def close() -> None:
        repeated = sum(node_lengths[node] for node in nodes & seen)
        parts.append(Part(tuple(sorted(responses)), tokens, repeated))
        seen.update(nodes)

    for response in np.argsort(np.asarray(lasts), kind="stable").tolist():
        new = _path_above(lasts[response], parents, nodes)
        added = sum(node_lengths[node] for node in new)
        if responses and tokens + added > capacity:
            close()
            nodes, responses, tokens = set(), [], 0
            new = _path_above(lasts[response], parents, nodes)
            added = sum(node_lengths[node] for node in new)
        nodes.update(new)
        responses.append(response)
        tokens += added
    close()
    return parts


def _path_above(node: int, parents: Sequence[int], nodes: set[int]) -> list[int]:
    """`node` and its ancestors that are not among `nodes`."""
    path = []
    while node >= 0 and node not in nodes:
        path.append(node)
        node = parents[node]
    return path


def cut_sequences(responses: Sequence[int], lengths: Sequence[int], limits: Limits) -> list[Part]:
    """The parts of a bundle in which each response is a sequence with its own prompt, so that
    nothing is repeated. `lengths` are those of `responses`, prompts included."""
    parts: list[Part] = []
    chosen: list[int] = []
    tokens = 0
    for response, length in zip(responses, lengths, strict=True):
        if chosen and not limits.allow(tokens + length, len(chosen) + 1):
            parts.append(Part(tuple(chosen), tokens, 0))
            chosen, tokens = [], 0
        chosen.append(response)
        tokens += length
    return [*parts, Part(tuple(chosen), tokens, 0)]
