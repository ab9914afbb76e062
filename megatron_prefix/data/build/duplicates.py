"""Detection of repeated records and prompts, by 64-bit digests of their texts and images.

    record  prompt  chosen  rejected    content digest  prompt digest
    0       "Hi"    "Yes"   "No"        a               p
    1       "Hi"    "Yes"   "Never"     b               p       the prompt of record 0
    2       "Hi"    "Yes"   "No"        a               p       repeats record 0

    duplicates(10) -> {"num_records": 1, "records": [[2, 0]]}        by_prompt() -> [0, 1, 2]

There is a digest for every group, so records are compared over the whole input. The probability
that two of a million different groups have the same digest is 3e-8.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from megatron_prefix.data.read import Text
from megatron_prefix.data.read.formats import Example
from megatron_prefix.errors import InputError

CACHE = 1024
"""KiB of a table that are kept in memory."""


def prompt_digest(example: Example, images: Sequence[str] = ()) -> int:
    """Digest of the tools, of the prompt (in a conversation tree, of the first set), and of the
    hashes of its images."""
    return _digest([*_given(example), *_parts(example.responses[0].prompt), *images])


def _given(example: Example) -> list[str]:
    """What a chat template is given beside the messages."""
    return [example.tools, *([example.template_kwargs] if example.template_kwargs else [])]


def content_digest(example: Example, images: Sequence[str] = ()) -> int:
    """Digest of all texts, images and labels: the pairs, or without pairs the scores; not the
    margins."""
    # A prompt is a part only if it differs from that of the response before: of a pair with the
    # prompt "Hi" the parts are [tools, "prompt", "text", "Hi", "response", "", "text", "Yes",
    # "response", "", "text", "No", "0 1"].
    parts = _given(example)
    last: Text | None = None
    for response in example.responses:
        if response.prompt != last:
            parts += ["prompt", *_parts(response.prompt)]
        last = response.prompt
        score = "" if example.pairs else repr(response.score)
        parts += ["response", score, *_parts(response.response)]
    parts += [f"{pair.chosen} {pair.rejected}" for pair in example.pairs]
    return _digest([*parts, *images])


def _parts(text: Text) -> list[str]:
    if isinstance(text, str):
        return ["text", text]
    return [part for turn in text for part in (turn.role, turn.content, turn.extra)]


def _digest(parts: list[str]) -> int:
    # With their lengths first, ["ab", "c"] and ["a", "bc"] are different texts.
    lengths = " ".join([str(len(part)) for part in parts])
    text = "".join([lengths, "\n", *parts])
    # SQLite's integers have 64 bits and a sign.
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def is_held_out(prompt: int, share: float, seed: int) -> bool:
    """Whether records with this digest of the prompt are held out.

    A function of prompt and seed alone: equal prompts are on one side, and no record changes sides
    if others are added. Of many prompts about `share` are held out.
    """
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


class Digests(NamedTuple):
    """The digests of one group; `record` is the number of its record in the input."""

    record: int
    content: int
    prompt: int

    @classmethod
    def of(cls, record: int, example: Example, images: Sequence[str] = ()) -> Digests:
        """`images` are the hashes of the prompt's images, in order."""
        return cls(record, content_digest(example, images), prompt_digest(example, images))


class DigestTable:
    """The digests of all groups of a build, in a private temporary file.

    Because of the file, a build needs no more memory for more records. Raises InputError if the
    file cannot grow.
    """

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)
        self._run("PRAGMA temp_store = FILE")
        self._run(f"PRAGMA cache_size = -{CACHE}")
        self._run("PRAGMA journal_mode = OFF")
        self._run("CREATE TABLE groups (id INTEGER PRIMARY KEY, record, content, prompt)")

    def extend(self, digests: Iterable[Digests]) -> None:
        """Append groups, in the order of their records."""
        with _full_disk_is_bad_input():
            self._table.executemany("INSERT INTO groups VALUES (NULL, ?, ?, ?)", digests)

    def duplicates(self, limit: int) -> dict[str, Any]:
        """How many records repeat an earlier one, and the first `limit` as [record, first]."""
        # For each record, `first` is the first one with its content: (0, 0), (1, 1), (2, 0).
        count, listed = 0, []
        for pair in self._rows(
            "SELECT record, first FROM (SELECT record, min(record) OVER (PARTITION BY content) "
            "AS first FROM groups) WHERE record > first ORDER BY record"
        ):
            count += 1
            if count <= limit:
                listed.append(list(pair))
        return {"num_records": count, "records": listed}

    def by_prompt(self) -> Iterator[list[int]]:
        """Groups with the same prompt, in the order in which prompts first appear.

        Prompts [7, 5, 7] -> [0, 2], [1].
        """
        # (group, first group with its prompt), sorted by the latter: (0, 1), (2, 1), (1, 2). SQLite
        # counts ids from 1.
        rows = self._rows(
            "SELECT id - 1, min(id) OVER (PARTITION BY prompt) AS first FROM groups "
            "ORDER BY first, id"
        )
        for _, members in groupby(rows, key=itemgetter(1)):
            yield [group for group, _ in members]

    def prompts(self) -> np.ndarray:
        """The digest of each group's prompt, int64 [groups]."""
        rows = self._rows("SELECT prompt FROM groups ORDER BY id")
        return np.fromiter((prompt for (prompt,) in rows), np.int64)

    def close(self) -> None:
        self._table.close()

    def _run(self, statement: str) -> None:
        with _full_disk_is_bad_input():
            self._table.execute(statement)

    def _rows(self, query: str) -> Iterator[tuple]:
        with _full_disk_is_bad_input():
            yield from self._table.execute(query)


def combined_duplicates(tables: Sequence[DigestTable], limit: int) -> dict[str, Any]:
    """`duplicates` of several tables that share no prompt, so no record repeats one of another."""
    parts = [table.duplicates(limit) for table in tables]
    records = sorted(pair for part in parts for pair in part["records"])
    return {
        "num_records": sum(part["num_records"] for part in parts),
        "records": records[:limit],
    }


@contextmanager
def _full_disk_is_bad_input() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise InputError(
            f"repeated records cannot be detected ({error}): this needs about 100 bytes per "
            "record in the folder for temporary files; set TMPDIR to one with enough space"
        ) from error
