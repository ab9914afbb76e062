"""Which records repeat one another: 64-bit digests of what is compared, and of the prompt.

Digests are kept for every group, 24 bytes each, so that a stream of any order and length is
compared as a whole. Of a million groups, two different ones get the same digest with a
probability of 3e-8.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_prefix.data.fields import Text
from megatron_prefix.data.formats.base import Example


def prompt_digest(example: Example) -> int:
    """Digest of the prompt (of the first set, in a conversation tree) and the tools."""
    return _digest([example.tools, *_parts(example.responses[0].prompt)])


def content_digest(example: Example) -> int:
    """Digest of all texts and of which is preferred to which, or desirable; not of margins."""
    parts = [example.tools]
    last: Text | None = None
    for response in example.responses:
        if response.prompt != last:
            parts += ["prompt", *_parts(response.prompt)]
        last = response.prompt
        alone = "" if example.pairs else repr(response.score)
        parts += ["response", alone, *_parts(response.response)]
    parts += [f"{pair.chosen} {pair.rejected}" for pair in example.pairs]
    return _digest(parts)


def _parts(text: Text) -> list[str]:
    if isinstance(text, str):
        return ["text", text]
    return [part for turn in text for part in (turn.role, turn.content, turn.extra)]


def _digest(parts: list[str]) -> int:
    pieces = []
    for part in parts:
        data = part.encode("utf-8")
        pieces += [len(data).to_bytes(8, "little"), data]
    digest = hashlib.blake2b(b"".join(pieces), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class Digests:
    """A digest of contents and one of the prompt for each group kept, in the order of records."""

    records: array = field(default_factory=lambda: array("q"))
    contents: array = field(default_factory=lambda: array("Q"))
    prompts: array = field(default_factory=lambda: array("Q"))

    def add(self, record: int, content: int, prompt: int) -> None:
        """One group; `record` is the index of the input record it comes from."""
        self.records.append(record)
        self.contents.append(content)
        self.prompts.append(prompt)

    def extend(self, later: Digests) -> None:
        """Append the groups of a later part of the stream."""
        self.records.extend(later.records)
        self.contents.extend(later.contents)
        self.prompts.extend(later.prompts)

    def duplicates(self, limit: int) -> dict[str, Any]:
        """How many records repeat an earlier one, and the first `limit` as [record, earlier]."""
        members, is_first = grouped(self.contents)
        records = np.array(self.records, np.int64)
        run = np.cumsum(is_first) - 1
        first = members[np.flatnonzero(is_first)][run] if len(members) else members
        repeated = np.sort(members[~is_first])
        earlier = np.empty(len(members), np.int64)
        earlier[members] = first
        listed = repeated[:limit]
        pairs = np.stack([records[listed], records[earlier[listed]]], axis=1)
        return {"num_records": len(repeated), "records": pairs.tolist()}


def grouped(digests: array) -> tuple[np.ndarray, np.ndarray]:
    """Indices sorted by digest, equal ones in their order, and where each run of them begins.

    Digests [7, 5, 7] -> [1, 0, 2] and [True, True, False].
    """
    values = np.array(digests, np.uint64)
    members = np.argsort(values, kind="stable")
    ordered = values[members]
    is_first = np.ones(len(values), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return members, is_first
