"""`megatron-prefix build`: raw preferences -> a data set."""

from __future__ import annotations

import argparse
import sys
import time

FORMAT_NAMES = (
    "hh",
    "trl",
    "unpaired",
    "ms-swift",
    "nemo-rl",
    "nemo-aligner",
    "alpaca",
    "sharegpt",
    "ultrafeedback",
    "oasst",
)
INTERVAL = 10.0
"""Seconds between lines of progress where standard error is not a terminal."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "build",
        help="raw preferences -> a data set",
        description="Read preference records, tokenise them, and write a data set in which every "
        "token of a group stands once. Ends with a summary.",
    )
    _add_records(parser)
    _add_tokens(parser)
    _add_handling(parser)
    parser.set_defaults(run=run)


def _add_records(parser: argparse.ArgumentParser) -> None:
    """Where records come from, what their columns mean, and where the data set goes."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE_OR_DATASET",
        help="JSON Lines or a JSON array of objects, plain or compressed with gzip or zstd; a "
        "Parquet file; a Hugging Face data set, its directory or its id",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="which split of a Hugging Face data set (default: the only one it has)",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin, .idx, .tree, .json"
    )
    parser.add_argument(
        "--format",
        choices=("auto", *FORMAT_NAMES),
        default="auto",
        help="what the columns mean, see docs/data_format.md. auto: found by the columns of the "
        "first record. hh: chosen and rejected are whole dialogues (default: auto)",
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=PATH",
        help="take a column from a dotted path into the record, lists by number, as in "
        "chosen=answers.0.text; may be given several times",
    )


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    """How texts become tokens, and how long a path may be."""
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="bytes; a SentencePiece model file; or a Hugging Face tokenizer's directory or id",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="longest path from the first prompt token to the response's end, in tokens, "
        "end-of-text included (default: no limit)",
    )
    parser.add_argument(
        "--overflow",
        choices=("error", "truncate-prompt", "drop"),
        default="error",
        help="what becomes of longer paths. drop: the response goes with its pairs. "
        "truncate-prompt: the oldest prompt tokens go, begin-of-text and the system message stay, "
        "alike for all responses of a prompt (default: error)",
    )
    parser.add_argument(
        "--no-append-eos",
        action="store_true",
        help="add no end-of-text token behind responses (default: added, unless the chat "
        "template put one)",
    )
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="let texts and messages spell the special tokens of a Hugging Face tokenizer "
        "(default: what looks like one in them is text, and counted)",
    )


def _add_handling(parser: argparse.ArgumentParser) -> None:
    """What becomes of repeated, wrong and degenerate records, and who does the work."""
    parser.add_argument(
        "--merge-prompts",
        action="store_true",
        help="make one group of all records with the same prompt, which stands once; batches go "
        "on counting records (default: a group a record)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="wrong records (not JSON, a column missing): stop, or count and skip (default: stop)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="records with nothing to compare are an error (default: dropped and counted)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the work; the bytes written are the same (default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    """Build and print the summary."""
    from megatron_prefix.data.build import BuildOptions, build_dataset
    from megatron_prefix.data.read import parse_columns

    options = BuildOptions(
        format=args.format,
        columns=parse_columns(args.map),
        split=args.split,
        parse_special=args.parse_special,
        merge_prompts=args.merge_prompts,
        max_length=args.max_length,
        overflow=args.overflow,
        append_eos=not args.no_append_eos,
        on_error=args.on_error,
        strict=args.strict,
        workers=args.workers,
    )
    with _Progress() as progress:
        report = build_dataset(args.input, args.tokenizer, args.output, options, progress)
    print(report.summary())
    print(f"wrote {args.output}.bin, .idx, .tree and .json")


class _Progress:
    """Bytes read and groups written: a bar on a terminal, a line every INTERVAL otherwise."""

    def __init__(self) -> None:
        self._bar = None
        self._next = time.monotonic() + INTERVAL

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, position: int, total: int, groups: int) -> None:
        if not sys.stderr.isatty():
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + INTERVAL
                share = f", {100 * position / total:.0f} % of the input" if total else ""
                print(f"build: {groups:,} groups{share}", file=sys.stderr)
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total or None, unit="B", unit_scale=True, desc="build", leave=False
            )
        self._bar.set_postfix_str(f"{groups:,} groups", refresh=False)
        self._bar.update(position - self._bar.n)
