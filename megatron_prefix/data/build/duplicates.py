"""Which records repeat one another: 64-bit digests of what is compared, and of the prompt.

Digests are kept for every group, so that a stream of any order and length is compared as a whole.
Of a million groups, two different ones get the same digest with a probability of 3e-8.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from megatron_prefix.data.read.fields import Text
from megatron_prefix.data.read.formats.base import Example
from megatron_prefix.errors import InputError

CACHE = 1024
"""KiB of a table that stay in memory."""


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
    lengths = " ".join([str(len(part)) for part in parts])
    text = "".join([lengths, "\n", *parts])
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Digests(NamedTuple):
    """Of one group; `record` is the index of the input record it comes from."""

    record: int
    content: int
    prompt: int

    @classmethod
    def of(cls, record: int, example: Example) -> Digests:
        return cls(record, content_digest(example), prompt_digest(example))


class DigestTable:
    """The digests of all groups of a build, in a temporary file that nobody else sees.

    Not kept in memory, so that a build takes no more of it for more records. Raises InputError
    where the file cannot grow.
    """

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)
        self._run("PRAGMA temp_store = FILE")
        self._run(f"PRAGMA cache_size = -{CACHE}")
        self._run("PRAGMA journal_mode = OFF")
        self._run("CREATE TABLE groups (id INTEGER PRIMARY KEY, record, content, prompt)")

    def extend(self, digests: Iterable[Digests]) -> None:
        """Append groups, in the order of their records."""
        with _room():
            self._table.executemany("INSERT INTO groups VALUES (NULL, ?, ?, ?)", digests)

    def duplicates(self, limit: int) -> dict[str, Any]:
        """How many records repeat an earlier one, and the first `limit` as [record, earlier]."""
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
        rows = self._rows(
            "SELECT id - 1, min(id) OVER (PARTITION BY prompt) AS first FROM groups "
            "ORDER BY first, id"
        )
        for _, members in groupby(rows, key=itemgetter(1)):
            yield [group for group, _ in members]

    def close(self) -> None:
        self._table.close()

    def _run(self, statement: str) -> None:
        with _room():
            self._table.execute(statement)

    def _rows(self, query: str) -> Iterator[tuple]:
        with _room():
            yield from self._table.execute(query)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise InputError(
            f"records cannot be compared with one another ({error}): this takes about 100 bytes "
            "a record in the folder for temporary files; name one with room in TMPDIR"
        ) from error
