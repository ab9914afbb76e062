"""`megatron-prefix inspect`: shows, checks and draws a data set or the packed steps of a run."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_prefix.errors import InputError
from megatron_prefix.text import counted


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "inspect",
        help="statistics, checksums, a tree as text, a packed row or a tree as a picture",
        description="Without flags: statistics of a data set, or a summary of a plan. Rows are "
        "packed from whole trees, as in training with data.rows_per_step, in the order of "
        "seed 0.",
    )
    parser.add_argument(
        "prefixes",
        nargs="+",
        metavar="PREFIX",
        help="a data set (without .bin or .idx), or a plan that pack wrote; several data sets are "
        "shown side by side",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check all checksums, and that the layout is valid"
    )
    parser.add_argument(
        "--data",
        metavar="PREFIX",
        help="with --verify of a plan: its data set, to check that its trees fit the rows",
    )
    parser.add_argument("--tree", type=int, metavar="N", help="show group N, counting from 0")
    parser.add_argument("--row", type=int, metavar="N", help="show packed row N, counting from 0")
    parser.add_argument(
        "--row-capacity",
        type=int,
        metavar="N",
        help="tokens per row; without --row it adds to the statistics how full rows are",
    )
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="draw the row of --row or the tree of --tree with its mask (.png, .svg, .pdf)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print what the flags select; without --tree and --row the statistics."""
    from megatron_prefix.data.steps.packed import is_packed_steps

    if len(args.prefixes) > 1:
        values, texts = _several(args)
        print(json.dumps(values, indent=1) if args.json else "\n\n".join(texts))
        return
    (args.prefix,) = args.prefixes
    values, texts = (_plan if is_packed_steps(args.prefix) else _dataset)(args)
    print(json.dumps(values, indent=1) if args.json else "\n\n".join(texts))


def _several(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Data sets side by side."""
    from megatron_prefix.data.inspect import compare_surveys, survey
    from megatron_prefix.data.store import PreferenceDataset
    from megatron_prefix.data.store.verify import verify_dataset

    for flag in ("tree", "row", "picture", "data", "row_capacity"):
        if getattr(args, flag) is not None:
            raise InputError(
                f"--{flag.replace('_', '-')} is for one data set or plan, and {len(args.prefixes)} "
                "are given: name one, or leave the flag out"
            )
    datasets = [PreferenceDataset(prefix, check=not args.verify) for prefix in args.prefixes]
    values: dict[str, Any] = {}
    texts = []
    if args.verify:
        for dataset in datasets:
            verify_dataset(dataset)
        values["verified"] = True
        texts.append(f"checksums and layout of all {len(datasets)} data sets are correct")
    values["statistics"] = [survey(dataset) for dataset in datasets]
    return values, [*texts, compare_surveys(values["statistics"])]


def _plan(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from megatron_prefix.data.steps.packed import (
        PackedSteps,
        describe_packed_steps,
        verify_packed_steps,
    )
    from megatron_prefix.data.store import PreferenceDataset

    for flag in ("tree", "row", "row_capacity", "picture"):
        if getattr(args, flag) is not None:
            name = flag.replace("_", "-")
            raise InputError(
                f"--{name} is for a data set, but {args.prefix} is a plan: leave it out, or give "
                "the data set"
            )
    if args.data and not args.verify:
        raise InputError("--data needs --verify, which checks a plan against it: add --verify")
    plan = PackedSteps(args.prefix, check=not args.verify)
    values: dict[str, Any] = {}
    texts: list[str] = []
    if args.verify:
        verify_packed_steps(plan, PreferenceDataset(args.data) if args.data else None)
        values["verified"] = True
        steps = counted(plan.manifest["counts"]["steps"], "step")
        fit = f", the trees of {args.data} fit the rows" if args.data else ""
        texts.append(f"{plan.path}: checksums and layout of {steps} are correct{fit}")
    values["plan"] = plan.manifest
    settings = (f"{name} {value}" for name, value in plan.manifest["settings"].items())
    texts.append(f"{describe_packed_steps(plan.manifest)}\n{', '.join(settings)}")
    return values, texts


def _dataset(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    _check_flags(args)
    from megatron_prefix.data.inspect import (
        survey,
        survey_text,
        tree_dict,
        tree_row,
        tree_text,
    )
    from megatron_prefix.data.store import PreferenceDataset
    from megatron_prefix.data.store.verify import verify_dataset

    dataset = PreferenceDataset(args.prefix, check=not args.verify)
    values: dict[str, Any] = {}
    texts: list[str] = []
    if args.verify:
        verify_dataset(dataset)
        values["verified"] = True
        texts.append(
            f"{dataset.prefix}: checksums and layout of {counted(len(dataset), 'group')} are "
            "correct"
        )
    if args.tree is not None:
        values["tree"] = {**tree_dict(dataset, args.tree), "picture": args.picture}
        texts.append(tree_text(dataset, args.tree))
        if args.picture:
            batch = tree_row(dataset, args.tree)
            _draw(dataset, args.picture, batch, [args.tree], batch.num_tokens)
            texts.append(f"wrote {args.picture}")
    if args.row is not None:
        values["row"] = _row(dataset, args)
        texts.append(_row_text(values["row"]))
    if args.tree is None and args.row is None:
        values["statistics"] = survey(dataset, args.row_capacity)
        texts.append(survey_text(values["statistics"]))
    return values, texts


def _check_flags(args: argparse.Namespace) -> None:
    if args.data:
        raise InputError(f"--data is for a plan, but {args.prefix} is not a plan: leave it out")
    if (args.row is not None) and not args.row_capacity:
        raise InputError("--row needs --row-capacity: give the tokens per row")
    if args.picture and (args.row is None) == (args.tree is None):
        raise InputError(
            "--picture draws a row or a tree: give --row and --row-capacity, or --tree"
        )
    if args.row_capacity is not None and args.row_capacity < 1:
        raise InputError(f"--row-capacity is {args.row_capacity}, but must be at least 1")
    if args.tree is not None and args.row_capacity and args.row is None:
        raise InputError("--row-capacity has no effect with --tree: leave it out, or add --row")


def _row(dataset: Any, args: argparse.Namespace) -> dict[str, Any]:
    from megatron_prefix.data.inspect import packed_row

    batch, groups = packed_row(dataset, args.row, args.row_capacity)
    if args.picture:
        _draw(dataset, args.picture, batch, groups, args.row_capacity, args.row)
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


def _draw(
    dataset: Any, path: str, batch: Any, groups: list[int], capacity: int, row: int | None = None
) -> None:
    from megatron_prefix.data.inspect import draw_row

    subject = f"tree {groups[0]}" if row is None else f"row {row}"
    draw_row(dataset, batch, groups, capacity, path, f"{dataset.prefix.name}, {subject}")


def _row_text(row: dict[str, Any]) -> str:
    text = (
        f"row {row['row']}: {row['tokens']:,} of {counted(row['row_capacity'], 'token')} "
        f"({100 * row['fill']:.1f} % full), {counted(len(row['groups']), 'tree')} in "
        f"{row['segments']} segments, {counted(row['responses'], 'response')}, "
        f"{counted(row['pairs'], 'pair')}, {counted(row['rows_projected'], 'token')} with logits\n"
        f"groups {', '.join(map(str, row['groups']))}"
    )
    return text + (f"\nwrote {row['picture']}" if row["picture"] else "")
