"""`megatron-prefix plan`: an estimate of a run's memory and savings; needs no GPU."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config
from megatron_prefix.errors import InputError

GIB = 2**30
PARTS = {"host_gradients": "in host memory: gradients of shadow steps"}
"""Parts of memory that need more words than their key."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "plan",
        help="parameters, memory per rank, pipeline bubble, savings by sharing; needs no GPU",
        description="Read a configuration, and its model's config.json and its data set if they "
        "are on this machine. Memory is computed, not measured: leave several GiB for CUDA, NCCL "
        "and fragmentation.",
    )
    add_config(parser)
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="processes, one per GPU (default: the fewest that the parallel section allows)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    if args.world_size is not None and args.world_size < 1:
        raise InputError(
            f"--world-size is {args.world_size}, but it must be at least 1: give another"
        )
    config = read_config(args)
    quiet_megatron()
    from megatron_prefix.estimate import plan_run

    estimate = plan_run(config, args.world_size)
    print(json.dumps(estimate, indent=1) if args.json else plan_text(estimate))


def plan_text(estimate: dict[str, Any]) -> str:
    """The estimate as text: one block for each part that is known."""
    from megatron_prefix.text import align

    ranks = estimate["data_parallel_size"]
    blocks = [[f"{estimate['world_size']} processes, {ranks} data-parallel ranks"]]
    if estimate["parameters"]:
        counts = estimate["parameters"]
        rows = [[f"  {name}", f"{count:,}"] for name, count in counts.items() if count]
        blocks.append(align([["parameters", f"{sum(counts.values()):,}"], *rows]))
    if estimate["memory"]:
        blocks.append(align(_memory_rows(estimate["memory"])))
    if estimate["data"]:
        blocks.append(_data_lines(estimate))
    if estimate["verdict"]:
        blocks.append([estimate["verdict"]])
    if estimate["missing"]:
        blocks.append([f"not known here: {text}" for text in estimate["missing"]])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _memory_rows(memory: dict[str, Any]) -> list[list[str]]:
    """GiB by component, with a column for the first, the fullest and the last pipeline stage."""
    stages, fullest = memory["stages"], memory["fullest_stage"]
    shown = sorted({0, fullest, len(stages) - 1})
    names = [f"stage {i}{' (fullest)' if i == fullest else ''}" for i in shown]
    rows = [[f"GiB per rank, rows of {memory['row_tokens']:,} tokens", *names]]
    for part in stages[0]:
        if any(stages[i][part] for i in shown):
            rows.append(
                [f"  {PARTS.get(part, part)}", *(f"{stages[i][part] / GIB:.1f}" for i in shown)]
            )
    return rows


def _data_lines(estimate: dict[str, Any]) -> list[str]:
    from megatron_prefix.text import align

    data, pipeline = estimate["data"], estimate["pipeline"]
    lines = [
        f"per step, over the first {data['steps_read']}: {data['groups_per_step']:,.1f} groups, "
        f"{data['pairs_per_step']:,.1f} pairs; at most {data['rows_per_rank']} rows per rank, "
        f"{data['tokens_per_row']:,.0f} tokens per row, the longest has {data['longest_row']:,}",
        f"pipeline bubble: {100 * pipeline['bubble']:.1f} % of the computing time of the stages",
    ]
    if "repeated_tokens_per_step" in data:
        lines.append(
            f"data.oversized: split repeats {data['repeated_tokens_per_step']:,.1f} tokens per "
            f"step; {100 * data['divided_steps']:.0f} % of the steps have parts"
        )
    table = [["sharing", "tokens per step", "of none", "forward TFLOP", "of none"]]
    none = data["sharing"]["none"]
    for mode, cost in data["sharing"].items():
        row = [f"  {mode}", f"{cost['tokens']:,.0f}", f"{cost['tokens'] / none['tokens']:.2f} x"]
        if cost["forward_flops"] is not None:
            ratio = cost["forward_flops"] / none["forward_flops"]
            row += [f"{cost['forward_flops'] / 1e12:,.3f}", f"{ratio:.2f} x"]
        table.append(row if len(row) == 5 else [*row, "", ""])
    return lines + align(table)
