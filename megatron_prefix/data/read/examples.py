"""Records -> Examples: which texts are compared, whatever the columns are called.

ExampleReader detects the format (see `formats`) from the first record's columns, or is given it.
For each record, it leaves out the columns of `--ignore-columns`, renames columns as `--map` asks,
decodes JSON texts, reads, and refuses what would be lost (unread.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_prefix.data.read.column_names import VERDICTS
from megatron_prefix.data.read.contradictions import (
    CONTRADICTION_MODES,
    NOTE_AGAINST,
    NOTE_EQUAL,
    settle_contradictions,
)
from megatron_prefix.data.read.formats import (
    FORMATS,
    DegenerateRecord,
    Example,
    Reads,
    detect_format,
    guess,
)
from megatron_prefix.data.read.mapping import mapped
from megatron_prefix.data.read.pictures import COLUMNS, Marked, lists_images
from megatron_prefix.data.read.records import Record
from megatron_prefix.data.read.repeats import NOTE_REPEATED, repeat_notes
from megatron_prefix.data.read.rows import joined_rows
from megatron_prefix.data.read.turns import ImagePart, without_json_texts
from megatron_prefix.data.read.unread import MESSAGE, unread_names
from megatron_prefix.errors import InputError

KINDS: dict[type, str] = {str: "text", list: "messages"}
NOTE_JSON = "records whose conversations are JSON texts (decoded)"


class ReaderState(NamedTuple):
    """What a reader has learnt from the records so far.

    The format, the type of `chosen`, and whether a record was of this format.
    """

    format: str
    kind: type | None = None
    has_read: bool = False


class ExampleReader:
    """Turns records into Examples and holds every record to the format of the first.

    `format` is "auto" (detected from the first record's columns) or one of FORMATS. `columns` maps
    a column's name to the path of its value in the record, see `mapped`. `ignored` are columns that
    are left out, and fields of messages (message.FIELD) that may be left unread. `on_contradiction`
    is one of CONTRADICTION_MODES. `attributes` are fields of responses with a score each.
    `no_images` is why images are refused, with the remedy; "" if they are read.
    """

    WARNINGS = (NOTE_AGAINST, NOTE_EQUAL, NOTE_REPEATED)
    """Notes of an Example that the user should act on."""

    def __init__(
        self,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        ignored: Collection[str] = (),
        on_contradiction: str = "keep",
        attributes: Sequence[str] = (),
        no_images: str = "",
    ) -> None:
        if format != "auto" and format not in FORMATS:
            raise InputError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
        if on_contradiction not in CONTRADICTION_MODES:
            raise InputError(
                f"on_contradiction {on_contradiction!r} is not one of "
                f"{', '.join(CONTRADICTION_MODES)}"
            )
        self.columns = dict(columns or {})
        self._ignored = frozenset(ignored)
        self._ignored_fields = {
            name.removeprefix(MESSAGE) for name in ignored if name.startswith(MESSAGE)
        }
        self._on_contradiction = on_contradiction
        self._attributes = tuple(attributes)
        self.no_images = no_images
        self._detects = format == "auto"
        self.state = ReaderState(format)
        """What the records so far have decided; a reader in another process can take it over."""
        self.unread: list[str] = []
        """Columns and fields of the last record that were not read."""
        self.left_out: set[str] = set()
        """Columns of `ignored` that this reader has met."""

    @property
    def format(self) -> str:
        return self.state.format

    def joined(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, joined from rows if each is only a part of one."""
        return joined_rows(records, lambda value: self._prepared(value)[0])

    def _prepared(self, record: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
        """The record as `--ignore-columns` and `--map` ask, and the columns that paths lead to."""
        if not self._ignored.isdisjoint(record):
            self.unread = [name for name in record if name in self._ignored]
            self.left_out.update(self.unread)
            record = {name: value for name, value in record.items() if name not in self._ignored}
        return mapped(record, self.columns)

    def read(self, record: dict[str, Any], is_joined: bool = False) -> Example:
        """One Example; a joined record is prepared already.

        Raises InputError (a wrong record) or DegenerateRecord.
        """
        self.unread, taken = [], frozenset[str]()
        if not is_joined:
            record, taken = self._prepared(record)
        record, is_json = without_json_texts(record)
        needed = () if is_joined else [name for name in self.columns if name not in COLUMNS]
        format = self.format if not self._detects else detect_format(record, needed)
        if self.format not in ("auto", format):
            raise InputError(
                f"the columns are those of format {format!r}, but the records before have "
                f"{self.format!r}: build one data set per format"
            )
        kind = self._kind_of(record)
        state = ReaderState(format, self.state.kind or kind, True)
        try:
            example = self._example(record, format, taken)
        except DegenerateRecord:
            self.state = state
            raise
        except InputError as error:
            if self._detects and not self.state.has_read:
                raise InputError(f"{error}; {guess(record, format)}") from None
            raise
        self.state = state
        return replace(example, notes=(*example.notes, NOTE_JSON)) if is_json else example

    def _kind_of(self, record: dict[str, Any]) -> type | None:
        """The type of `chosen`, which all records must have in common."""
        value, first = record.get("chosen"), self.state.kind
        kind = list if isinstance(value, list | dict) else str if isinstance(value, str) else None
        if first and kind and kind is not first:
            raise InputError(
                f"formats are mixed: chosen is {KINDS[kind]}, but in the records before it was "
                f"{KINDS[first]}: build one data set per format"
            )
        return kind

    def _example(self, record: dict[str, Any], name: str, taken: frozenset[str]) -> Example:
        """The Example of a record; its images are found only if it has some."""
        if not lists_images(record):
            if any(column in record for column in COLUMNS):  # empty ones
                record = {key: value for key, value in record.items() if key not in COLUMNS}
            try:
                return self._read_texts(record, name, taken)
            except ImagePart:
                pass
        if self.no_images:
            raise InputError(f"the record has images, and {self.no_images}")
        marked = Marked(record, self._ignored_fields)
        example = self._read_texts(marked.record, name, taken, has_images=True)
        return marked.attached(example)

    def _read_texts(
        self, record: dict[str, Any], name: str, taken: frozenset[str], has_images: bool = False
    ) -> Example:
        format, reads = FORMATS[name], Reads(record, self._attributes)
        example = format.read(reads)
        if any(len(x.attributes) != len(self._attributes) for x in example.responses):
            raise InputError(
                f"--attributes {' '.join(self._attributes)}: responses of format {name!r} have "
                "none: give lists of responses with scores (ranked), or responses with a label "
                "(unpaired)"
            )
        self.unread += unread_names(
            record,
            example,
            format=name,
            read=reads.reads,
            taken=taken,
            fields=(*format.fields, *self._attributes),
            harmless=format.harmless,
            harmless_fields=self._ignored_fields,
            has_images=has_images,
        )
        self._refuse_other_verdict()
        notes = repeat_notes(example)
        if notes:
            example = replace(example, notes=(*example.notes, *notes))
        return settle_contradictions(example, self._on_contradiction)

    def _refuse_other_verdict(self) -> None:
        """Raise InputError if `--map` chooses a side, and an unread column may name the other."""
        sides = {"chosen", "rejected", "chosen_response", "rejected_response"} & {*self.columns}
        verdict = next((name for name in self.unread if name in VERDICTS), None)
        if sides and verdict is not None and verdict not in self._ignored:
            raise InputError(
                f"--map gives {' and '.join(sorted(sides))}, but column {verdict!r} names the "
                "better response of each record, and it is not read: remove these flags if a "
                "format reads that column (docs/datasets.md), or write the better response to "
                f"chosen; if it means something else, leave it out with --ignore-columns {verdict}"
            )
