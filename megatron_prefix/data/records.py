"""Files of preference records, read one record at a time, each with the line it stands on.

A file holds one JSON object a line, or one JSON array of objects; either may be gzipped. What a
file is, is decided by its first bytes, not by its name. Lines are streamed; an array is read
whole, because JSON gives no other safe place to cut it.

A record that cannot be read is handed on with its `error` in place of a value, so that the
caller decides whether to stop there or to count it and go on.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_prefix.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
EXPECTED = "one JSON object a line, or one array of objects, plain or gzipped"
OTHER_KINDS = {
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\x03\x04": "a zip",
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of the input. `index` counts records over all inputs, unreadable ones too.

    `line` counts from 1; exactly one of `value` and `error` is set.
    """

    index: int
    path: Path
    line: int
    value: dict[str, Any] | None = None
    error: str | None = None

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.line}"


def check_inputs(paths: Sequence[Path]) -> None:
    """Refuse inputs that are missing or of another kind, before anything is read or written."""
    if not paths:
        raise InputError("no input file was given: name at least one with --input")
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a directory: name the files in it ({EXPECTED})")
        if not path.exists():
            raise InputError(f"{path}: no such file. An input is a file with {EXPECTED}")
        try:
            with path.open("rb") as file:
                start = file.read(4)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
        if start in OTHER_KINDS:
            raise InputError(
                f"{path} is {OTHER_KINDS[start]}, which is not read: write it as {EXPECTED}"
            )


def read_records(
    paths: Sequence[Path], on_bytes: Callable[[int], None] | None = None
) -> Iterator[Record]:
    """Every record of the files, in order. `on_bytes` hears how many bytes were read so far."""
    index, before = 0, 0
    for path in paths:
        with path.open("rb") as raw:
            for line, value, error in _read_file(raw):
                if on_bytes is not None:
                    on_bytes(before + raw.tell())
                yield Record(index=index, path=path, line=line, value=value, error=error)
                index += 1
        before += path.stat().st_size


Item = tuple[int, dict[str, Any] | None, str | None]


def _read_file(raw: BinaryIO) -> Iterator[Item]:
    zipped = raw.peek(2)[:2] == GZIP_MAGIC  # type: ignore[attr-defined]
    file = gzip.GzipFile(fileobj=raw) if zipped else raw
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
        what = "the gzip data is damaged or cut off" if zipped else "the file cannot be read"
        yield line + 1, None, f"{what} ({error})"
        return
    if not found:
        yield 1, None, f"the file holds no record: {EXPECTED} is expected"


def _starts_array(file: Any) -> bool:
    """Whether the first character that is not white space opens an array; the file is rewound."""
    while block := file.read(4096):
        text = block.removeprefix(BOM).lstrip()
        if text:
            file.seek(0)
            return text[:1] == b"["
    file.seek(0)
    return False


def _read_lines(file: Any) -> Iterator[Item]:
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(BOM)
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, None, _not_utf8(error)
        except (ValueError, RecursionError) as error:
            torn = "" if raw.endswith(b"\n") else "; it is the last line: was the file cut off?"
            yield number, None, f"not JSON ({_reason(error)}): {EXPECTED} is expected{torn}"
        else:
            yield number, *_object(value)


def _read_array(data: bytes) -> Iterator[Item]:
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        yield data.count(b"\n", 0, error.start) + 1, None, _not_utf8(error)
        return
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while True:
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            break
        try:
            value, at = decoder.raw_decode(text, at)
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
    return names[type(value)]
