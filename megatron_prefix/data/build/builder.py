"""Raw preferences -> a data set on disk, a chunk of records at a time.

    file -> Record -> Example -> token paths -> what fits and differs -> PrefixTree -> store

Two kinds of bad input are told apart. A wrong record (not JSON, a column missing) stops the
build, or is counted and passed over with `on_error="skip"`. A degenerate one (nothing to
compare) is dropped and counted by reason, or stops the build with `strict`.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_prefix.data.build.combine import combine
from megatron_prefix.data.build.duplicates import Digests, DigestTable
from megatron_prefix.data.build.prompt_groups import merge_prompts, place_before_merging
from megatron_prefix.data.build.report import MAX_LISTED, BuildReport
from megatron_prefix.data.build.workers import ordered
from megatron_prefix.data.read.examples import ExampleReader
from megatron_prefix.data.read.formats.base import DEGENERATE, DegenerateRecord, Example
from megatron_prefix.data.read.records import Record, check_inputs, input_bytes, scan_records
from megatron_prefix.data.store.blocks import Block
from megatron_prefix.data.store.dataset import PreferenceDataset
from megatron_prefix.data.store.writer import DatasetWriter
from megatron_prefix.data.tokenize.hf_tokenizer import single_threaded
from megatron_prefix.data.tokenize.paths import (
    OVERFLOW_MODES,
    PathEncoder,
    Selection,
    TooLong,
    select,
)
from megatron_prefix.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_prefix.data.tree import MergedPaths, merge_paths
from megatron_prefix.errors import InputError

CHUNK, CHUNK_BYTES, FIRST_CHUNK = 2048, 1 << 21, 32
"""Records, or bytes of them, that are read, built and written together. The first chunk is built
before any worker starts: it is small."""

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How records become trees.

    `max_length` bounds one root-to-leaf path in tokens, end-of-text included. `overflow` says
    what happens to longer ones: "error", "truncate-prompt" or "drop". `on_error` is "stop" or
    "skip" for wrong records; `strict` makes degenerate records an error. `columns` maps columns
    to the dotted paths of their values, `split` names a part of a Hugging Face data set,
    `parse_special` lets texts spell special tokens, and `merge_prompts` makes one group of all
    records with the same prompt. `workers` processes share the work and change no byte.
    """

    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    parse_special: bool = False
    merge_prompts: bool = False
    max_length: int | None = None
    overflow: str = "error"
    append_eos: bool = True
    on_error: str = "stop"
    strict: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"--workers is {self.workers}: at least one process has to work")
        if self.overflow not in OVERFLOW_MODES:
            raise InputError(
                f"overflow {self.overflow!r} is not one of {', '.join(OVERFLOW_MODES)}"
            )
        if self.on_error not in ("stop", "skip"):
            raise InputError(f"on_error {self.on_error!r} is not one of stop, skip")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(
                f"--max-length is {self.max_length}: a path has at least 2 tokens, one of the "
                "prompt and one of the response"
            )
        if self.max_length is None and self.overflow != "error":
            raise InputError(f"--overflow {self.overflow} needs --max-length")


def build_dataset(
    inputs: Sequence[str | Path],
    tokenizer: str | Tokenizer,
    output: str | Path,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build data set `output` and return what happened.

    `progress` hears (bytes read, bytes in all, groups written) after each chunk. Raises
    InputError for bad input or settings; then nothing is left behind.
    """
    options, started = options or BuildOptions(), time.monotonic()
    with contextlib.closing(DigestTable()) as digests, single_threaded():
        if not options.merge_prompts:
            report = _build(inputs, tokenizer, output, options, digests, progress)
        else:
            with place_before_merging(output) as place:
                separate = replace(options, merge_prompts=False)
                report = _build(inputs, tokenizer, place, separate, digests, progress)
                merge_prompts(PreferenceDataset(place), digests, report, output)
    report.seconds = time.monotonic() - started
    return report


def _build(
    inputs: Sequence[str | Path],
    tokenizer: str | Tokenizer,
    output: str | Path,
    options: BuildOptions,
    digests: DigestTable,
    progress: Progress | None,
) -> BuildReport:
    """A group a record; `digests` hears of every one."""
    paths = [Path(path) for path in inputs]
    reader = ExampleReader(options.format, options.columns)
    check_inputs(paths, options.split)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer, options.parse_special)
    encoder = PathEncoder(tokenizer, options.append_eos)
    report, total = BuildReport(), input_bytes(paths)
    kept = {**asdict(options), "inputs": [str(path) for path in paths]}
    kept.pop("workers")  # they change no byte
    state = vars(reader).copy()
    with (
        DatasetWriter(output, tokenizer.describe(), kept) as writer,
        contextlib.closing(
            ordered(
                ChunkBuilder(reader, encoder, options),
                (replace(chunk, reader=state) for chunk in _chunks(paths, options.split)),
                options.workers,
            )
        ) as results,
    ):
        for chunk, result in results:
            if chunk.reader != state:  # records before it set another rule meanwhile
                result = ChunkBuilder(reader, encoder, options)(replace(chunk, reader=state))
            if result.error is not None:
                raise result.error
            state = result.reader
            combine(report, result.report)
            if result.block is not None:
                writer.add_block(result.block)
                digests.extend(result.digests)
            if progress is not None:
                progress(chunk.position, total, writer.statistics.counts["groups"])
        if not writer.statistics.counts["groups"]:
            raise InputError(_nothing_left(paths, report))
        report.duplicates = digests.duplicates(MAX_LISTED)
        report.manifest = writer.finish(report.as_dict())
    return report


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Records that are built together; `reader` is the state of the ExampleReader before them,
    `position` how many bytes of the input were read behind them."""

    records: list[Record]
    position: int
    reader: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkResult:
    """A chunk's groups (None where none is left), their digests, its report, and the reader's
    state behind it; or the error that stops a build, unless the chunk was built in a state that
    records before it have changed."""

    block: Block | None
    digests: list[Digests]
    report: BuildReport
    reader: dict[str, Any]
    error: InputError | None = None


class ChunkBuilder:
    """Chunk -> ChunkResult, a function of the chunk alone, in whichever process."""

    def __init__(self, reader: ExampleReader, encoder: PathEncoder, options: BuildOptions) -> None:
        self._reader, self._encoder, self._options = reader, encoder, options

    def __call__(self, chunk: Chunk) -> ChunkResult:
        reader, encoder, report = self._reader, self._encoder, BuildReport()
        vars(reader).update(chunk.reader)
        encoder.num_tokens = 0
        error = None
        groups: list[MergedPaths] = []
        digests: list[Digests] = []
        try:
            with _collector_paused():
                for record in chunk.records:
                    report.num_records += 1
                    made = _made_of(record, reader, encoder, self._options, report)
                    if made is not None:
                        example, group = made
                        groups.append(group)
                        digests.append(Digests.of(record.index, example))
        except InputError as stopping:
            error = stopping
        report.format, report.num_tokens_made = reader.format, encoder.num_tokens
        block = Block.of_paths(groups, [digest.record for digest in digests]) if groups else None
        state = vars(reader).copy()
        return ChunkResult(block=block, digests=digests, report=report, reader=state, error=error)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No search for cyclic garbage: records make none, and everything loaded is searched."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _chunks(paths: Sequence[Path], split: str | None) -> Iterator[Chunk]:
    position = 0

    def heard(count: int) -> None:
        nonlocal position
        position = count

    chunk: list[Record] = []
    size, most = 0, FIRST_CHUNK
    for record in scan_records(paths, heard, split):
        chunk.append(record)
        size += record.size
        if len(chunk) == most or size >= CHUNK_BYTES:
            yield Chunk(records=chunk, position=position)
            chunk, size, most = [], 0, CHUNK
    if chunk:
        yield Chunk(records=chunk, position=position)


def _made_of(
    record: Record,
    reader: ExampleReader,
    encoder: PathEncoder,
    options: BuildOptions,
    report: BuildReport,
) -> tuple[Example, MergedPaths] | None:
    """What the record says, and its tree; None where it is dropped. The report hears of all."""
    record = record.decoded()
    where = f"{record.path.name}:{record.line}"
    try:
        if record.value is None:
            raise InputError(record.error)
        example = reader.read(record.value)
        paths, notes = encoder.encode(example)
        selection = select(
            example,
            paths,
            encoder=encoder,
            max_length=options.max_length,
            overflow=options.overflow,
        )
        _count_dropped(selection, where, options, report)
    except DegenerateRecord as degenerate:
        if options.strict:
            raise InputError(
                f"{record.where}: {degenerate}. Take the record out, or build without --strict, "
                "which drops and counts such records"
            ) from None
        report.drop(str(degenerate), where, groups=1)
        return None
    except TooLong as error:
        raise InputError(f"{record.where}: {error}") from None
    except InputError as error:
        if options.on_error == "stop":
            raise InputError(
                f"{record.where}: {error}. Mend the record, or pass over such records with "
                "--on-error skip"
            ) from None
        report.skip_wrong(where, str(error))
        return None
    if not selection.paths:
        return None
    for note in (*example.notes, *notes):
        report.note(note)
    report.num_cut_groups += selection.num_cut > 0
    report.num_cut_responses += selection.num_cut
    report.num_cut_tokens += selection.cut_tokens
    return example, merge_paths(selection.paths, selection.pairs)


def _count_dropped(
    selection: Selection, where: str, options: BuildOptions, report: BuildReport
) -> None:
    """Count a lost group under its first reason, or else what the group lost by reason."""
    if options.strict:
        for reason in selection.dropped:
            if reason in DEGENERATE:
                raise DegenerateRecord(reason)
    if not selection.paths:
        report.drop(next(iter(selection.dropped)), where, groups=1)
        return
    for reason, (responses, pairs) in selection.dropped.items():
        report.drop(reason, where, responses=responses, pairs=pairs)


def _nothing_left(paths: Sequence[Path], report: BuildReport) -> str:
    """Why no group is left, by the reasons that took them."""
    reasons = [f"{lost.groups} x {reason}" for reason, lost in report.dropped.items()]
    if report.wrong.num_records:
        reasons.append(f"{report.wrong.num_records} x wrong ({report.wrong_reasons[0]})")
    names = ", ".join(str(path) for path in paths)
    return f"{names}: nothing is left of {report.num_records} records: {'; '.join(reasons)}"
