"""`megatron-prefix inspect`: look at a data set, check it, draw a row of it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_prefix.errors import InputError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "inspect",
        help="statistics, checksums, a tree as text, a packed row as a picture",
        description="Without flags: statistics of a data set. Rows are packed from whole trees, "
        "as training with data.rows_per_step packs them, in the order of seed 0.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="the data set, without an ending")
    parser.add_argument(
        "--verify", action="store_true", help="check all checksums and invariants of the layout"
    )
    parser.add_argument("--tree", type=int, metavar="N", help="show group N, counted from 0")
    parser.add_argument("--row", type=int, metavar="N", help="show packed row N, counted from 0")
    parser.add_argument(
        "--row-capacity",
        type=int,
        metavar="N",
        help="tokens a row; alone it adds the fill of rows to the statistics",
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="draw row --row with its mask (.png, .svg, .pdf)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what was asked for; without --tree and --row that is the statistics."""
    if (args.row is not None) and not args.row_capacity:
        raise InputError("--row needs --row-capacity, the tokens a row")
    if args.picture and args.row is None:
        raise InputError("--picture needs --row and --row-capacity: which row to draw")
    if args.row_capacity is not None and args.row_capacity < 1:
        raise InputError(f"--row-capacity is {args.row_capacity}, it must be at least 1")
    if args.tree is not None and args.row_capacity and args.row is None:
        raise InputError("--row-capacity says nothing about a tree: leave it out, or give --row")
    from megatron_prefix.data import describe
    from megatron_prefix.data.store import PreferenceDataset

    dataset = PreferenceDataset(args.prefix)
    values: dict[str, Any] = {}
    texts: list[str] = []
    if args.verify:
        dataset.verify()
        values["verified"] = True
        texts.append(f"{dataset.prefix}: checksums and layout of {len(dataset):,} groups are sound")
    if args.tree is not None:
        values["tree"] = describe.tree_dict(dataset, args.tree)
        texts.append(describe.tree_text(dataset, args.tree))
    if args.row is not None:
        values["row"] = _row(dataset, args)
        texts.append(_row_text(values["row"]))
    if args.tree is None and args.row is None:
        values["statistics"] = describe.statistics(dataset, args.row_capacity)
        texts.append(describe.statistics_text(values["statistics"]))
    print(json.dumps(values, indent=1) if args.json else "\n\n".join(texts))


def _row(dataset: Any, args: argparse.Namespace) -> dict[str, Any]:
    from megatron_prefix.data.describe import row_items

    batch, groups = row_items(dataset, args.row, args.row_capacity)
    if args.picture:
        from megatron_prefix.data.picture import draw_row

        title = f"{dataset.prefix.name}, row {args.row}"
        draw_row(dataset, batch, groups, args.row_capacity, args.picture, title)
    return {
        "row": args.row,
        "row_capacity": args.row_capacity,
        "groups": groups,
        "tokens": batch.num_tokens,
        "fill": round(batch.num_tokens / args.row_capacity, 4),
        "segments": len(batch.layout.starts),
        "responses": batch.num_responses,
        "pairs": len(batch.pairs),
        "rows_projected": batch.num_projected,
        "picture": args.picture,
    }


def _row_text(row: dict[str, Any]) -> str:
    text = (
        f"row {row['row']}: {row['tokens']:,} of {row['row_capacity']:,} tokens "
        f"({100 * row['fill']:.1f} % full), {len(row['groups'])} trees in {row['segments']} "
        f"segments, {row['responses']} responses, {row['pairs']} pairs, "
        f"{row['rows_projected']:,} rows projected\n"
        f"groups {', '.join(map(str, row['groups']))}"
    )
    return text + (f"\nwrote {row['picture']}" if row["picture"] else "")
