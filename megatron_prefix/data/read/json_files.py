"""JSON Lines files and files with one JSON value, plain or compressed with gzip or zstd.

The first bytes of a file decide what it is, not its name. Lines are streamed. An array, and objects
over several lines, are read as a whole, because JSON has no other safe place to cut them.

    {"prompt": …}\n{"prompt": …}       one record per line
    [{"prompt": …}, …]                 one array
    {\n "prompt": …\n}\n{\n …           records over several lines, one after another
    {"data": [{"prompt": …}, …]}       one object with the records, see whole_files.py
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

from megatron_prefix.data.read.fields import json_type
from megatron_prefix.data.read.whole_files import records_of, table_hint

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BOM = b"\xef\xbb\xbf"
EXPECTED = (
    "one JSON object per line, or one array of objects, plain or compressed, Parquet or Arrow"
)

Decoded = tuple[dict[str, Any] | None, str | None]
"""The record, or None and what is wrong with it."""
JsonItem = tuple[int, dict[str, Any] | bytes | None, str | None]
"""Line number; the record, or its line as bytes that are not decoded yet, or None; the error."""


def read_json_file(raw: io.BufferedReader) -> Iterator[JsonItem]:
    """Every record of an open file; of JSON Lines the lines, which `decode_line` decodes.

    If the file is damaged, the last item has the error and all items before it are good.
    """
    file, compression = _opened(raw)
    line, is_empty = 0, True
    try:
        items = _read_array(file.read()) if _starts_array(file) else _read_objects(file, raw.name)
        for line, value, error in items:
            is_empty = False
            yield line, value, error
    except (EOFError, OSError, zlib.error) as error:
        damage = "the file cannot be read"
        if compression:
            damage = f"the {compression} data is damaged or cut off; nothing after it is read"
        yield line + 1, None, f"{damage} ({error})"
        return
    if is_empty:
        yield 1, None, f"the file contains no record; expected: {EXPECTED}"


def decode_line(line: bytes) -> Decoded:
    """The record of one line."""
    try:
        return _object(DECODER.decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return None, _not_utf8(error)
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else "; it is the last line, so the file may be cut off"
        return None, f"not JSON ({_reason(error)}); expected: {EXPECTED}{torn}"


def _opened(raw: io.BufferedReader) -> tuple[io.BufferedIOBase, str]:
    """The decompressed contents of a file, and the name of the compression or ""."""
    start = raw.peek(4)[:4]
    if start[:2] == GZIP_MAGIC:
        return gzip.open(raw), "gzip"  # of a damaged file it gives all lines before the damage
    if start == ZSTD_MAGIC:
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(_Unclosed(raw), "zstd")), "zstd"
    return raw, ""


class _Unclosed(io.RawIOBase):
    """A file that stays open when its reader closes it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are unique; json.loads would keep the last of two equal ones."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice[:80]!r} twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


def _starts_array(file: Any) -> bool:
    """Whether the first character is "[", after white space; the file's position stays."""
    return file.peek(4096).removeprefix(BOM).lstrip()[:1] == b"["


def _read_objects(file: io.BufferedIOBase, name: str) -> Iterator[JsonItem]:
    """The lines of a file, or the objects of a file whose objects have several lines."""
    lines = _read_lines(file)
    first = next(lines, None)
    if first is None:
        return
    number, line, _ = first
    assert isinstance(line, bytes)
    hint = table_hint(line, name)
    if hint is not None:
        yield number, None, hint
        return
    if line.rstrip()[-1:] in (b"{", b"[", b","):
        yield from _read_concatenated(line + file.read(), number)
        return
    second = next(lines, None)
    if second is None:
        value, error = decode_line(line)
        whole = records_of(value) if value is not None else None
        if whole is not None:
            yield from ((number, *item) for item in whole)
            return
    yield first
    if second is not None:
        yield second
        yield from lines


def _read_lines(file: io.BufferedIOBase) -> Iterator[JsonItem]:
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip():
            yield number, raw, None


def _read_concatenated(data: bytes, line: int) -> Iterator[JsonItem]:
    """Objects one after another, each over several lines; `line` is the number of the first."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield line + data.count(b"\n", 0, error.start), None, _not_utf8(error)
        return
    first, position = line, _skip_space(text, 0)
    while position < len(text):
        line, start = first + text.count("\n", 0, position), position
        try:
            value, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line = first + error.lineno - 1
            yield line, None, f"not JSON ({_reason(error)}); expected: {EXPECTED}"
            return
        position = _skip_space(text, position)
        is_only = not text[:start].strip() and position == len(text)
        whole = records_of(value) if is_only else None
        for record, problem in whole or [_object(value)]:
            yield line, record, problem


def _read_array(data: bytes) -> Iterator[JsonItem]:
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, None, _not_utf8(error)
        return
    # Invariant: `position` is at a value, or at the closing bracket.
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0  # line breaks before `counted` are in `line`
    while True:
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        try:
            value, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            error_line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield error_line, None, f"not JSON ({_reason(error)}); expected: {EXPECTED}"
            return
        yield line, *_object(value)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            yield line, None, "not JSON (a comma or the closing bracket of the array is missing)"
            return
    if text[position + 1 :].strip():
        yield line, None, "not JSON (text after the end of the array)"


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(value: Any) -> Decoded:
    if isinstance(value, dict):
        return value, None
    return None, f"the record is {json_type(value)}, not an object; expected: {EXPECTED}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}): "
        "convert the file, for example with iconv -t UTF-8"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
