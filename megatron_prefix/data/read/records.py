"""Preference records of any source, read one at a time, each with its line for error messages.

An input is a JSON file (json_files.py), a Parquet or Arrow file, or a Hugging Face data set
(tables.py): a directory or a hub id. The first bytes of a file decide what it is, not its name. The
files of a directory that is no data set are read one after another.

A record that cannot be read is passed on with an `error` and no value. So the caller decides
whether to stop, or to count it and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prefix.data.read.json_files import EXPECTED, JsonItem, decode_line, read_json_file
from megatron_prefix.data.read.tables import (
    ARROW_MAGIC,
    TableItem,
    is_dataset,
    open_dataset,
    read_arrow,
    read_dataset,
    read_parquet,
    shards_of,
)
from megatron_prefix.errors import InputError

PARQUET_MAGIC = b"PAR1"
STREAM_MAGIC = b"\xff\xff\xff\xff"
REFUSED = {
    b"PK\x03\x04": "a zip file",
    b"\xfd7zXZ": "compressed with xz: unpack it with xz -d",
    b"BZh": "compressed with bzip2: unpack it with bzip2 -d",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite data base",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
}
"""First bytes of files that are not read, and what they are."""


class Record(NamedTuple):
    """One record. `number` counts the records of all inputs from 0, unreadable ones too.

    `line` is the line in the file (in a table, the row) and counts from 1. Exactly one of `value`,
    `error` and `raw` is set; `raw` is a line of JSON that is not decoded yet. A record that is
    joined from several rows has the place of the first; see rows.py.
    """

    number: int
    path: Path
    line: int
    value: dict[str, Any] | None = None
    error: str | None = None
    raw: bytes | None = None
    unit: str = "line"
    rows: int = 1
    is_joined: bool = False

    @property
    def size(self) -> int:
        """Bytes of its line, or characters of its texts."""
        return _num_characters(self.value) if self.raw is None else len(self.raw)

    def decoded(self) -> Record:
        """The same record with its value or its error."""
        if self.raw is None:
            return self
        value, error = decode_line(self.raw)
        return self._replace(value=value, error=error, raw=None)

    @property
    def place(self) -> str:
        """Its file and line, for error messages."""
        return f"{self.path}, {self.unit} {self.line}"


def _num_characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0


class Inputs:
    """The inputs of a build, in order; `split` names one part of a Hugging Face data set."""

    def __init__(self, paths: Sequence[str | Path], split: str | None = None) -> None:
        self.paths = [Path(path) for path in paths]
        self.split = split
        self._files = [file for path in self.paths for file in shards_of(path) or [path]]

    def check(self) -> None:
        """Raise InputError if an input is missing or is not of a known kind."""
        if not self.paths:
            raise InputError("no input file was given: name at least one with --input")
        for path in self._files:
            if is_dataset(path):
                open_dataset(path, self.split)
            elif self.split is not None:
                raise InputError(
                    f"--split {self.split}: {path} is not a Hugging Face data set, and only those "
                    "have splits: remove the flag"
                )
            else:
                _check_file(path)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files; Hugging Face data sets count as 0."""
        return sum(map(_num_bytes, self._files))

    def read(self) -> Iterator[Record]:
        """Every record, in order."""
        return (record.decoded() for record in self.scan())

    def scan(self, on_bytes: Callable[[int], None] | None = None) -> Iterator[Record]:
        """Every record, in order; lines of JSON are left to `Record.decoded`, which another
        process may call.

        `on_bytes` is called with the number of bytes read so far.
        """
        number, bytes_before = 0, 0
        for path in self._files:
            for (line, content, error), position, unit in _read_input(path, self.split):
                if on_bytes is not None:
                    on_bytes(bytes_before + position)
                if isinstance(content, bytes):
                    yield Record(number, path, line, None, error, content, unit)
                else:
                    yield Record(number, path, line, content, error, None, unit)
                number += 1
            bytes_before += _num_bytes(path)


def _num_bytes(path: Path) -> int:
    return 0 if is_dataset(path) else path.stat().st_size


def _check_file(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file. An input is a file with {EXPECTED}")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    for magic, kind in REFUSED.items():
        if start.startswith(magic):
            raise InputError(f"{path} is {kind}, which is not supported: write it as {EXPECTED}")


def _read_input(path: Path, split: str | None) -> Iterator[tuple[JsonItem | TableItem, int, str]]:
    """Of one input: (item, bytes read so far, what the item's number counts)."""
    if is_dataset(path):
        for item in read_dataset(path, split):
            yield item, 0, "row"
        return
    with path.open("rb") as raw:
        start = raw.peek(8)
        if start.startswith((PARQUET_MAGIC, ARROW_MAGIC, STREAM_MAGIC)):
            read = read_parquet if start.startswith(PARQUET_MAGIC) else read_arrow
            for item, share in read(path):
                yield item, int(share * path.stat().st_size), "row"
            return
        for line in read_json_file(raw):
            yield line, raw.tell(), "line"
