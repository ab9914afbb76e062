"""Preference records of any source, read one at a time, each with the line it stands on.

A file holds one JSON object a line, or one JSON array of objects, plain or compressed with gzip
or zstd; or it is a Parquet file. What a file is, is decided by its first bytes, not by its name.
Lines are streamed; an array is read whole, because JSON gives no other safe place to cut it. A
directory or an id of the hub is a Hugging Face data set (tables.py).

A record that cannot be read is handed on with its `error` in place of a value, so that the
caller decides whether to stop there or to count it and go on. `scan_records` leaves lines as they
are, for whoever decodes them in another process.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_prefix.data.read.tables import is_dataset, open_dataset, read_dataset, read_parquet
from megatron_prefix.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
PARQUET_MAGIC = b"PAR1"
BOM = b"\xef\xbb\xbf"
EXPECTED = "one JSON object a line, or one array of objects, plain or compressed, or Parquet"


class Record(NamedTuple):
    """One record of the input. `index` counts records over all inputs, unreadable ones too.

    `line` (of a table the row) counts from 1; exactly one of `value` and `error` is set, or `raw`,
    a line of JSON that is not decoded yet.
    """

    index: int
    path: Path
    line: int
    value: dict[str, Any] | None = None
    error: str | None = None
    raw: bytes | None = None
    unit: str = "line"

    @property
    def size(self) -> int:
        """Bytes of its line, or characters of its texts."""
        return _num_characters(self.value) if self.raw is None else len(self.raw)

    def decoded(self) -> Record:
        """With its value or error."""
        if self.raw is None:
            return self
        value, error = _decode(self.raw)
        return self._replace(value=value, error=error, raw=None)

    @property
    def where(self) -> str:
        return f"{self.path}, {self.unit} {self.line}"


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0


def check_inputs(paths: Sequence[Path], split: str | None = None) -> None:
    """Refuse inputs that are missing or of another kind, before anything is read or written."""
    if not paths:
        raise InputError("no input file was given: name at least one with --input")
    for path in paths:
        if is_dataset(path):
            open_dataset(path, split)
            continue
        if split is not None:
            raise InputError(
                f"--split {split}: {path} is no Hugging Face data set; only those have splits"
            )
        if not path.exists():
            raise InputError(f"{path}: no such file. An input is a file with {EXPECTED}")
        try:
            with path.open("rb") as file:
                start = file.read(4)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
        if start == b"PK\x03\x04":
            raise InputError(f"{path} is a zip, which is not read: write it as {EXPECTED}")


def input_bytes(paths: Sequence[Path]) -> int:
    """Bytes of all input files; Hugging Face data sets count as none."""
    return sum(path.stat().st_size for path in paths if not is_dataset(path))


def read_records(paths: Sequence[Path], split: str | None = None) -> Iterator[Record]:
    """Every record of the inputs, in order."""
    return (record.decoded() for record in scan_records(paths, split=split))


def scan_records(
    paths: Sequence[Path],
    on_bytes: Callable[[int], None] | None = None,
    split: str | None = None,
) -> Iterator[Record]:
    """Every record of the inputs, in order, lines not decoded.

    `on_bytes` hears how many bytes were read so far.
    """
    index, before = 0, 0
    for path in paths:
        for (line, found, error), position, unit in _read_input(path, split):
            if on_bytes is not None:
                on_bytes(before + position)
            value, raw = (None, found) if isinstance(found, bytes) else (found, None)
            yield Record(index, path, line, value, error, raw, unit)
            index += 1
        before += input_bytes([path])


Item = tuple[int, dict[str, Any] | bytes | None, str | None]
"""Number, the record or its line or None, and why it is None."""


def _read_input(path: Path, split: str | None) -> Iterator[tuple[Item, int, str]]:
    """(item, bytes read so far, what the item's number counts) of one input."""
    if is_dataset(path):
        for item in read_dataset(path, split):
            yield item, 0, "row"
        return
    with path.open("rb") as raw:
        if raw.peek(4)[:4] == PARQUET_MAGIC:
            for item, share in read_parquet(path):
                yield item, int(share * path.stat().st_size), "row"
            return
        for item in _read_file(raw):
            yield item, raw.tell(), "line"


def _opened(raw: BinaryIO) -> tuple[BinaryIO, str]:
    """The file's contents, decompressed, and the name of the compression or ""."""
    start = raw.peek(4)[:4]  # type: ignore[attr-defined]
    if start[:2] == GZIP_MAGIC:
        return gzip.GzipFile(fileobj=raw), "gzip"  # a damaged one gives all lines before
    if start == ZSTD_MAGIC:
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(_Unclosed(raw), "zstd")), "zstd"
    return raw, ""


class _Unclosed(io.RawIOBase):
    """A file for a reader that closes what it reads from."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined]


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are unique: of two equal ones a reader would take the last."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice[:80]!r} twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


def _read_file(raw: BinaryIO) -> Iterator[Item]:
    file, compression = _opened(raw)
    line, found = 0, False
    try:
        if _starts_array(file):
            items = _read_array(file.read())
        else:
            items = _read_lines(file)
        for line, value, error in items:
            found = True
            yield line, value, error
    except (EOFError, OSError, zlib.error) as error:
        what = f"the {compression} data is damaged or cut off, and nothing behind is read"
        yield line + 1, None, f"{what if compression else 'the file cannot be read'} ({error})"
        return
    if not found:
        yield 1, None, f"the file holds no record: {EXPECTED} is expected"


def _starts_array(file: Any) -> bool:
    """Whether an array opens behind at most a buffer of white space; nothing is consumed."""
    return file.peek(4096).removeprefix(BOM).lstrip()[:1] == b"["


def _read_lines(file: Any) -> Iterator[Item]:
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip():
            yield number, raw, None


def _decode(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The value of a line, or what is wrong with it."""
    try:
        return _object(DECODER.decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return None, _not_utf8(error)
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else "; it is the last line: was the file cut off?"
        return None, f"not JSON ({_reason(error)}): {EXPECTED} is expected{torn}"


def _read_array(data: bytes) -> Iterator[Item]:
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, None, _not_utf8(error)
        return
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while True:
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            break
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield where, None, f"not JSON ({_reason(error)}): {EXPECTED} is expected"
            return
        yield line, *_object(value)
        at = _skip_space(text, at)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            yield line, None, "not JSON (a comma or the closing bracket of the array is missing)"
            return
    if text[at + 1 :].strip():
        yield line, None, "not JSON (text after the end of the array)"


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _object(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    if isinstance(value, dict):
        return value, None
    return None, f"the record is {json_type(value)}, not an object: {EXPECTED} is expected"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): "
        "convert the file, for instance with iconv -t UTF-8"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def json_type(value: Any) -> str:
    """A JSON value's type as a reader of the file knows it, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
