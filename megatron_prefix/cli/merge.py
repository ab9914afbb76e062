"""`megatron-prefix merge`: data sets that were built in parts -> one data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "merge",
        help="data sets that were built in parts -> one data set",
        description="Join data sets that were built from parts of the input, with the same "
        "tokenizer and the same options. The result is byte for byte the data set that one build "
        "of all inputs would write.",
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="the parts, in their order")
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="write PREFIX.bin, .idx, .tree, .json"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Merge the parts and print the counts."""
    from megatron_prefix.data.build import merge_datasets
    from megatron_prefix.text import format_counts

    manifest = merge_datasets(args.prefixes, args.output)
    if len({Path(prefix).resolve() for prefix in args.prefixes}) < len(args.prefixes):
        print("merge: a part is given twice, so its records count twice", file=sys.stderr)
    print("\n".join(format_counts(manifest["counts"], manifest["tokens"], manifest["lengths"])))
    print(f"wrote {args.output}.bin, .idx, .tree and .json")
