"""Raw preferences -> a data set on disk.

    inputs -> chunks of records -> blocks of trees, in worker processes -> one writer

Chunks are built in any process and written in their order, so the files do not depend on the
number of workers. chunks.py has what happens to a record.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_prefix.data.build.chunks import Chunk, ChunkBuilder, read_chunks
from megatron_prefix.data.build.combine import combine
from megatron_prefix.data.build.duplicates import DigestTable, combined_duplicates
from megatron_prefix.data.build.group_texts import GroupTexts
from megatron_prefix.data.build.mismatches import add_mismatches, source_of
from megatron_prefix.data.build.options import BuildOptions
from megatron_prefix.data.build.prompt_groups import merge_prompts, place_before_merging
from megatron_prefix.data.build.report import MAX_LISTED, BuildReport
from megatron_prefix.data.build.workers import ordered, single_threaded_tokenizers
from megatron_prefix.data.files import checked_prefix
from megatron_prefix.data.read import ExampleReader, Inputs
from megatron_prefix.data.store import DatasetWriter, PreferenceDataset
from megatron_prefix.data.tokenize import PathEncoder, Tokenizer, load_tokenizer
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

Progress = Callable[[int, int, int], None]


def build_dataset(
    inputs: Sequence[str | Path],
    tokenizer: str | Tokenizer,
    output: str | Path,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build data set `output` and return a report.

    With `options.holdout`, the groups of some prompts go to a second data set, `output`_valid.
    `progress` is called with (bytes read, bytes in all, groups written) after each chunk. Raises
    InputError for bad input or settings; then no file remains.
    """
    options, started = options or BuildOptions(), time.monotonic()
    if not options.overwrite:
        for prefix in _outputs(output, options):
            _check_unused(prefix)
    with contextlib.ExitStack() as stack:
        stack.enter_context(single_threaded_tokenizers())
        tables = [
            stack.enter_context(contextlib.closing(DigestTable()))
            for _ in range(options.num_outputs)
        ]
        # Each stage writes to a temporary place, and the last one to `output`.
        kinds = ["merging"] * options.merge_prompts + ["matching"] * options.kto
        places = [stack.enter_context(place_before_merging(output, kind)) for kind in kinds]
        places.append(Path(output))
        texts = [
            stack.enter_context(contextlib.closing(GroupTexts()))
            for _ in range(options.num_outputs * options.kto)
        ]
        separate = replace(options, merge_prompts=False)
        report, encoder = _build(inputs, tokenizer, places[0], separate, tables, texts, progress)
        if options.merge_prompts:
            sources = [
                PreferenceDataset(path, check=False) for path in _outputs(places[0], options)
            ]
            merge_prompts(sources, tables, report, _outputs(places[1], options))
        if options.kto:
            sources = [
                PreferenceDataset(path, check=False) for path in _outputs(places[-2], options)
            ]
            add_mismatches(
                [
                    source_of(source, table, own, options.merge_prompts)
                    for source, table, own in zip(sources, tables, texts, strict=True)
                ],
                _outputs(output, options),
                encoder,
                options,
                report,
            )
    report.seconds = time.monotonic() - started
    return report


def _check_unused(prefix: Path) -> None:
    for suffix in (".json", ".bin", ".idx", ".images", ".tree"):
        if (path := Path(f"{prefix}{suffix}")).exists():
            raise InputError(
                f"output {prefix}: {path} is there already: give another --output, or --overwrite "
                "to replace it"
            )


def _outputs(output: str | Path, options: BuildOptions) -> list[Path]:
    """The prefixes that a build writes."""
    prefix = checked_prefix(output)
    return [prefix, prefix.with_name(f"{prefix.name}_valid")][: options.num_outputs]


def _build(
    paths: Sequence[str | Path],
    tokenizer: str | Tokenizer,
    output: str | Path,
    options: BuildOptions,
    tables: Sequence[DigestTable],
    texts: Sequence[GroupTexts],
    progress: Progress | None,
) -> tuple[BuildReport, PathEncoder]:
    """Build one group per record; `tables`, and with `--kto` `texts`, get an entry for each, one
    per data set."""
    inputs = Inputs(paths, options.split)
    reader = ExampleReader(
        options.format,
        options.columns,
        options.ignored,
        options.on_contradiction,
        options.attributes,
    )
    inputs.check()
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer, options.parse_special)
    reader.no_images = tokenizer.no_images
    encoder = PathEncoder(tokenizer, options.bos, options.eos)
    report, total = BuildReport(), inputs.num_bytes
    recorded = {**asdict(options), "inputs": [str(path) for path in inputs.paths]}
    # The files do not depend on the first two; add_mismatches notes the others.
    for name in ("workers", "overwrite", "kto", "kto_seed"):
        recorded.pop(name)
    if not options.attributes:
        recorded.pop("attributes")  # as before there were any
    state = reader.state
    build_chunk = ChunkBuilder(reader, encoder, options)
    chunks = (  # read as workers ask for them, with the state that is known by then
        Chunk(records=records, position=position, reader=state)
        for records, position in read_chunks(inputs, reader)
    )
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(DatasetWriter(prefix, encoder.describe(), recorded | part))
            for prefix, part in zip(_outputs(output, options), _parts(options), strict=True)
        ]
        results = stack.enter_context(
            contextlib.closing(ordered(build_chunk, chunks, options.workers))
        )
        for chunk, result in results:
            # A worker may get a chunk before the first good record has set the format. If the
            # chunks before it end in another state, it is built again here.
            if chunk.reader != state:
                result = build_chunk(replace(chunk, reader=state))
            if result.error is not None:
                raise result.error
            state = result.reader
            combine(report, result.report)
            report.limit_unread()
            for own, part in zip(texts, result.parts, strict=False):
                own.extend(part.texts)
            for writer, table, part in zip(writers, tables, result.parts, strict=True):
                if part.block is not None:
                    writer.add_block(part.block)
                    # Digests are numbered by their place in the table, so they follow the order
                    # of groups.
                    table.extend(part.digests)
            if progress is not None:
                progress(chunk.position, total, _num_groups(writers))
        for name in options.ignored:
            if name not in report.unread and name not in reader.left_out:
                raise InputError(
                    f"--ignore-columns {name}: no record has it among the columns that are not "
                    "read: remove the flag, or correct the name"
                )
        if not _num_groups(writers):
            raise InputError(_nothing_left(inputs, report))
        _check_sides(writers, options)
        report.duplicates = combined_duplicates(tables, MAX_LISTED)
        report.publish(writers)
    return report, encoder


def _parts(options: BuildOptions) -> list[dict[str, str]]:
    """What the manifests of the data sets of one build have as an option of their own."""
    return [{}] if options.holdout is None else [{"part": "train"}, {"part": "valid"}]


def _num_groups(writers: Sequence[DatasetWriter]) -> int:
    return sum(writer.statistics.counts["groups"] for writer in writers)


def _check_sides(writers: Sequence[DatasetWriter], options: BuildOptions) -> None:
    """Refuse a split of which one side is empty."""
    for writer in writers:
        if not writer.statistics.counts["groups"]:
            raise InputError(
                f"--holdout {options.holdout} leaves none of "
                f"{counted(_num_groups(writers), 'group')} for {writer.prefix}: give another share "
                "or --holdout-seed, or more records"
            )


def _nothing_left(inputs: Inputs, report: BuildReport) -> str:
    """Why no group is left, with a count per reason."""
    reasons = [f"{dropped.groups} x {reason}" for reason, dropped in report.dropped.items()]
    if report.wrong.num_records:
        reasons.append(f"{report.wrong.num_records} x wrong ({report.wrong_reasons[0]})")
    names = ", ".join(str(path) for path in inputs.paths)
    return (
        f"{names}: nothing is left of {counted(report.num_records, 'record')}: {'; '.join(reasons)}"
    )
