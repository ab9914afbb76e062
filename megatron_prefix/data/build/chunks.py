"""Chunks of records and what becomes of them: the part of a build that worker processes share.

    Record -> Example -> token paths -> those that fit and differ -> MergedPaths

There are two kinds of bad records. A wrong one (not JSON, a column missing) stops the build, or is
counted and skipped with `on_error="skip"`. A degenerate one (nothing to compare) is dropped and
counted by reason, or stops the build with `strict`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.data.build.chunk_images import ChunkImages
from megatron_prefix.data.build.duplicates import Digests, is_held_out
from megatron_prefix.data.build.group_texts import GroupText, packed
from megatron_prefix.data.build.options import BuildOptions
from megatron_prefix.data.build.report import BuildReport
from megatron_prefix.data.images import PictureTable
from megatron_prefix.data.read import ExampleReader, Inputs, ReaderState, Record
from megatron_prefix.data.read.formats import DegenerateRecord, Example, Reason
from megatron_prefix.data.store import Block
from megatron_prefix.data.tokenize import PathEncoder, Selection, TooLong, select
from megatron_prefix.data.tree import MergedPaths, merge_paths
from megatron_prefix.data.tree_images import Placed
from megatron_prefix.errors import InputError

CHUNK, CHUNK_BYTES, FIRST_CHUNK = 2048, 1 << 21, 32
"""Records, or bytes of them, that are read, built and written together. The first chunk is small,
because it is built before any worker starts."""
OTHERS = 32
"""Records that are tried before an error says that only one record is wrong."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Records that are built together.

    `position` is how many bytes of the input were read after them, `reader` the state of the
    ExampleReader before them.
    """

    records: list[Record]
    position: int
    reader: ReaderState


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """The groups of a chunk that go to one data set: None if there are none, and one entry of
    `digests` per group; with `--kto` also of `texts`, see group_texts.py."""

    block: Block | None
    digests: list[Digests]
    texts: list[bytes]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkResult:
    """What a chunk became.

    `parts` are its groups for each data set that is built: one, or with `holdout` two. `reader` is
    the state of the ExampleReader after it. `error` stops the build; but a chunk that was built
    with a stale reader state is built again first.
    """

    parts: list[Part]
    report: BuildReport
    reader: ReaderState
    error: InputError | None = None


def read_chunks(inputs: Inputs, reader: ExampleReader) -> Iterator[tuple[list[Record], int]]:
    """The `records` and the `position` of every Chunk; `reader` joins rows to records."""
    position = 0

    def on_bytes(count: int) -> None:
        nonlocal position
        position = count

    records: list[Record] = []
    size, most = 0, FIRST_CHUNK
    for record in reader.joined(inputs.scan(on_bytes)):
        records.append(record)
        size += record.size
        # A few huge records must not fill the memory, so their bytes end a chunk too.
        if len(records) == most or size >= CHUNK_BYTES:
            yield records, position
            records, size, most = [], 0, CHUNK
    if records:
        yield records, position


class ChunkBuilder:
    """Chunk -> ChunkResult; the result depends on the chunk only, not on the process."""

    def __init__(self, reader: ExampleReader, encoder: PathEncoder, options: BuildOptions) -> None:
        self._reader, self._encoder, self._options = reader, encoder, options
        self._images = ChunkImages(encoder.tokenizer)
        self._records: list[Record] = []

    def __call__(self, chunk: Chunk) -> ChunkResult:
        reader, encoder, report = self._reader, self._encoder, BuildReport()
        reader.state = chunk.reader
        encoder.reset_counts()
        self._images.begin()
        error = None
        sides: list[list[Group]] = [[] for _ in range(self._options.num_outputs)]
        self._records = chunk.records
        try:
            with _collector_paused():
                for record in chunk.records:
                    report.num_records += 1
                    report.num_rows += record.rows
                    if built := self._build(record, report):
                        example, group, kept, images = built
                        hashes = self._images.hashes(images)
                        digests = Digests.of(record.number, example, hashes)
                        text = b""
                        if self._options.kto:
                            text = packed(GroupText.of(example, kept))
                        sides[self._side(digests)].append((group, digests, text))
        except InputError as stopping:
            error = stopping
        report.format, report.num_tokens_made = reader.format, encoder.num_tokens
        report.added = vars(encoder.added)
        parts = [_part(side, self._images.table()) for side in sides]
        return ChunkResult(parts=parts, report=report, reader=reader.state, error=error)

    def _side(self, digests: Digests) -> int:
        """0, or 1 if the group is held out."""
        share, seed = self._options.holdout, self._options.holdout_seed
        return 0 if share is None else int(is_held_out(digests.prompt, share, seed))

    def _build(
        self, record: Record, report: BuildReport
    ) -> tuple[Example, MergedPaths, tuple[int, ...], tuple[Placed, ...]] | None:
        """A record's Example, its tree, which responses are in it, and the images of its prompt, or
        None if it is dropped; `report` counts everything."""
        record, options = record.decoded(), self._options
        place = f"{record.path.name}:{record.line}"
        try:
            if record.value is None:
                raise InputError(record.error)
            example = self._read(record.value, record.is_joined, report)
            images = self._place(example, record.path)
            paths, notes = self._encoder.encode(example, images)
            selection = select(
                example,
                paths,
                encoder=self._encoder,
                max_length=options.max_length,
                overflow=options.overflow,
            )
            _count_dropped(selection, place, options, report)
        except DegenerateRecord as degenerate:
            if options.strict:
                raise InputError(
                    f"{record.place}: {degenerate}. Remove the record, or build without --strict, "
                    "which drops and counts such records"
                ) from None
            report.drop(str(degenerate), place, groups=1)
            return None
        except TooLong as error:
            raise InputError(f"{record.place}: {error}") from None
        except InputError as error:
            if options.on_error == "stop":
                raise InputError(f"{record.place}: {error}{self._remedy(record)}") from None
            report.skip_wrong(place, str(error))
            return None
        if not selection.paths:
            return None
        for note in (*example.notes, *notes):
            report.note(note)
        report.num_cut_groups += selection.num_cut > 0
        report.num_cut_responses += selection.num_cut
        report.num_cut_tokens += selection.cut_tokens
        tree = merge_paths(selection.paths, selection.pairs)
        return example, tree, selection.kept, images

    def _place(self, example: Example, path: Path) -> tuple[Placed, ...]:
        """The images of a record of the input `path`."""
        if not example.images:
            return ()
        return self._images.place(example.images, path if path.is_dir() else path.parent)

    def _read(self, value: dict[str, Any], is_joined: bool, report: BuildReport) -> Example:
        """The Example of a record; `report` counts the columns that were not read."""
        try:
            return self._reader.read(value, is_joined)
        finally:
            for name in self._reader.unread:
                report.count_unread(name)

    def _remedy(self, wrong: Record) -> str:
        """What to do about a wrong record, if other records are right."""
        reader = self._reader
        if not reader.state.has_read:
            for record in self._records[:OTHERS]:
                value = record.decoded().value
                if value is None or record is wrong:
                    continue
                with contextlib.suppress(InputError, DegenerateRecord):
                    reader.read(value, record.is_joined)
                    break
            else:
                return ""
        return ". Correct the record, or skip such records with --on-error skip"


Group = tuple[MergedPaths, Digests, bytes]
"""A group's tree, its digests, and with `--kto` its texts."""


def _part(groups: list[Group], table: PictureTable | None) -> Part:
    digests = [digest for _, digest, _ in groups]
    paths, records = [path for path, _, _ in groups], [digest.record for digest in digests]
    return Part(
        block=Block.of_paths(paths, records, table) if groups else None,
        digests=digests,
        texts=[text for _, _, text in groups],
    )


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No search for cyclic garbage: records make none, and a search visits every loaded object."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _count_dropped(
    selection: Selection, place: str, options: BuildOptions, report: BuildReport
) -> None:
    """Count what a group lost by reason; a lost group counts under its first reason only."""
    if options.strict:
        for reason in selection.dropped:
            if reason in Reason.DEGENERATE:
                raise DegenerateRecord(reason)
    if not selection.paths:
        report.drop(next(iter(selection.dropped)), place, groups=1)
        return
    for reason, (responses, pairs) in selection.dropped.items():
        report.drop(reason, place, responses=responses, pairs=pairs)
