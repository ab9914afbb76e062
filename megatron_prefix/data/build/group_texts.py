"""The texts of the groups of a build, kept in a temporary file: a response can then be put after
the prompt of another group."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.data.read import Text
from megatron_prefix.data.read.formats import Example
from megatron_prefix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GroupText:
    """What a group was made of: the prompt of its first response, its responses in their order, and
    what a chat template is given beside the messages."""

    prompt: Text
    responses: tuple[Text, ...]
    tools: str
    template_kwargs: str

    @classmethod
    def of(cls, example: Example, kept: Sequence[int]) -> GroupText:
        """Of the responses of an Example that remain, by their number in it."""
        return cls(
            prompt=example.responses[kept[0]].prompt,
            responses=tuple(example.responses[i].response for i in kept),
            tools=example.tools,
            template_kwargs=example.template_kwargs,
        )


class GroupTexts:
    """Texts by number of the group, in a private temporary file that `close` removes.

    Processes that are forked, or get it pickled, read the same file. Raises InputError if the file
    cannot grow.
    """

    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="megatron_prefix.texts.")
        self._path = Path(name)
        self._writer = os.fdopen(handle, "wb")
        self._ends = [0]

    def extend(self, entries: Iterable[bytes]) -> None:
        """Append groups, as `packed` made them."""
        try:
            for entry in entries:
                self._writer.write(entry)
                self._ends.append(self._ends[-1] + len(entry))
        except OSError as error:
            raise InputError(
                f"--kto: the texts of the groups cannot be kept in {self._path} "
                f"({error.strerror}): set TMPDIR to a folder with enough space"
            ) from error

    def __getitem__(self, group: int) -> GroupText:
        if not self._writer.closed:
            self._writer.flush()
        with self._path.open("rb") as file:
            file.seek(self._ends[group])
            return pickle.loads(file.read(self._ends[group + 1] - self._ends[group]))

    def close(self) -> None:
        self._writer.close()
        self._path.unlink(missing_ok=True)

    def __getstate__(self) -> dict:
        self._writer.flush()
        return {"_path": self._path, "_ends": self._ends, "_writer": None}


def packed(text: GroupText) -> bytes:
    return pickle.dumps(text)
