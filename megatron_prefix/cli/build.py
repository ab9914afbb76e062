"""`megatron-prefix build`: raw preferences -> a data set."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from megatron_prefix.errors import InputError

if TYPE_CHECKING:
    from tqdm import tqdm

FORMAT_NAMES = (
    "hh",
    "trl",
    "unpaired",
    "unpaired-messages",
    "unpaired-alpaca",
    "ms-swift",
    "messages",
    "sharegpt",
    "ultrainteract",
    "nemo-rl",
    "nemo-aligner",
    "alpaca",
    "question",
    "ultrafeedback",
    "ranked",
    "choice",
    "arena",
    "arena-votes",
    "summaries",
    "webgpt",
    "rlhf-v",
    "shp",
    "oasst",
)
INTERVAL = 10.0
"""Seconds between lines of progress if standard error is not a terminal."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "build",
        help="raw preferences -> a data set",
        description="Read preference records, tokenize them, and write a data set that contains "
        "every token of a group once. Prints a summary at the end.",
    )
    _add_records(parser)
    _add_tokens(parser)
    _add_handling(parser)
    parser.set_defaults(run=run)


def _add_records(parser: argparse.ArgumentParser) -> None:
    """Flags for the input, the meaning of its columns, and the output."""
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
        help="split of a Hugging Face data set (default: its only split)",
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin, .idx, .tree, .json"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a data set at PREFIX (default: it is an error)",
    )
    parser.add_argument(
        "--format",
        choices=("auto", *FORMAT_NAMES),
        default="auto",
        help="what the columns mean, see docs/data_format.md. auto: decided by the columns of the "
        "first record. hh: chosen and rejected are whole dialogues (default: auto)",
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=PATH",
        help="move a column to the name that a format reads (instruction=question), or take it "
        "from a place in the record: chosen=answers.0.text, or of every entry of a list "
        "completions[].response=answers[].text; may be given several times",
    )
    parser.add_argument(
        "--ignore-columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="leave out these columns; message.FIELD leaves out a field of messages or entries. "
        "Without it, a column that can change the text and that the format does not read stops "
        "the build",
    )

    parser.add_argument(
        "--attributes",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="fields of each response of a list (or columns of records with a label) that hold a "
        "score, for a reward model with one score each (model.num_labels); a missing one is "
        "unknown",
    )


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    """Flags for the tokenizer and the lengths."""
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="bytes, a SentencePiece model file, or a Hugging Face tokenizer (directory or id)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="maximum length from the first prompt token to the end of a response, in tokens, "
        "end-of-text included (default: no limit)",
    )
    parser.add_argument(
        "--overflow",
        choices=("error", "truncate-prompt", "drop"),
        default="error",
        help="what to do with longer responses. error: stop. drop: remove the response and its "
        "pairs. truncate-prompt: remove the oldest text of the prompt, in the same way for all its "
        "responses. Begin-of-text, system messages and the headers of turns stay (default: error)",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "always", "never"),
        default="auto",
        help="begin-of-text before a prompt. auto: before a text if the tokenizer puts it there by "
        "itself, and never before what a chat template writes. always: wherever it is not there "
        "already. never: nowhere (default: auto)",
    )
    end = parser.add_mutually_exclusive_group()
    end.add_argument(
        "--eos",
        choices=("auto", "always", "never"),
        default="auto",
        help="end-of-text after a response. auto: after a text that does not end with it, and "
        "never after what a chat template writes. always: wherever it is not there already. "
        "never: nowhere (default: auto)",
    )
    end.add_argument(
        "--no-append-eos",
        dest="eos",
        action="store_const",
        const="never",
        help="the same as --eos never",
    )
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="read the spelling of a special token in texts and messages as that token of the "
        "Hugging Face tokenizer (default: it is ordinary text, and reported)",
    )


def _add_handling(parser: argparse.ArgumentParser) -> None:
    """Flags for repeated, malformed and degenerate records, and for parallel work."""
    parser.add_argument(
        "--merge-prompts",
        action="store_true",
        help="make one group of all records with the same prompt; batches still count records "
        "(default: one group per record)",
    )
    parser.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="write the groups of this share of the prompts to PREFIX_valid instead, for "
        "evaluation. No prompt is in both, and none changes sides when records are added "
        "(default: no second data set)",
    )
    parser.add_argument(
        "--holdout-seed",
        type=int,
        default=1234,
        metavar="S",
        help="decides which prompts --holdout takes (default: 1234)",
    )
    parser.add_argument(
        "--kto",
        action="store_true",
        help="also put a response of another prompt after each prompt, which loss.loss_type: kto "
        "measures its distance to the reference on; other losses ignore these (default: none)",
    )
    parser.add_argument(
        "--kto-seed",
        type=int,
        metavar="S",
        help="decides which responses --kto takes (default: 1234)",
    )
    parser.add_argument(
        "--on-contradiction",
        choices=("keep", "drop", "swap", "error"),
        default="keep",
        help="pairs of which the chosen response has no higher score than the rejected one: keep "
        "and count them, drop them, swap the two if the scores contradict the label, or stop "
        "(default: keep)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="malformed records (not JSON, a missing column): stop, or skip and count them "
        "(default: stop)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at a record that has nothing to compare (default: drop and count it)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="number of processes; the data set does not depend on it (default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    """Build the data set and print the summary."""
    from megatron_prefix.data.build import BuildOptions, build_dataset
    from megatron_prefix.data.read import parse_columns

    if args.kto_seed is not None and not args.kto:
        raise InputError(f"--kto-seed {args.kto_seed} has no effect without --kto: give both")
    options = BuildOptions(
        format=args.format,
        columns=parse_columns(args.map),
        ignored=tuple(dict.fromkeys(args.ignore_columns)),
        attributes=tuple(args.attributes),
        split=args.split,
        parse_special=args.parse_special,
        merge_prompts=args.merge_prompts,
        max_length=args.max_length,
        overflow=args.overflow,
        holdout=args.holdout,
        holdout_seed=args.holdout_seed,
        kto=args.kto,
        **({} if args.kto_seed is None else {"kto_seed": args.kto_seed}),
        bos=args.bos,
        eos=args.eos,
        on_contradiction=args.on_contradiction,
        on_error=args.on_error,
        strict=args.strict,
        overwrite=args.overwrite,
        workers=args.workers,
    )
    with _Progress() as progress:
        report = build_dataset(args.input, args.tokenizer, args.output, options, progress)
    print(report.summary())
    for prefix in [args.output, f"{args.output}_valid"][: options.num_outputs]:
        print(f"wrote {prefix}.bin, .idx, .tree and .json")


class _Progress:
    """Progress in bytes read and groups written: a bar on a terminal, else a line per INTERVAL."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
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
