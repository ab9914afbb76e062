"""`megatron-prefix plan`: what a run will need, before it has a GPU."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config
from megatron_prefix.errors import InputError

GIB = 2**30


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "plan",
        help="parameters, memory a rank, pipeline bubble, what sharing saves; without a GPU",
        description="Reads a configuration and what of its model (config.json) and data set lies "
        "on this machine. Memory is computed, not measured: leave several GiB for CUDA, NCCL and "
        "fragmentation.",
    )
    add_config(parser)
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="processes, one a GPU (default: the least that the parallel section takes)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    if args.world_size is not None and args.world_size < 1:
        raise InputError(f"--world-size is {args.world_size}, it must be at least 1")
    config = read_config(args)
    quiet_megatron()
    from megatron_prefix.estimate.planning import plan_run

    found = plan_run(config, args.world_size)
    print(json.dumps(found, indent=1) if args.json else plan_text(found))


def plan_text(found: dict[str, Any]) -> str:
    """The plan for people: a block for each thing that is known."""
    from megatron_prefix.text import align

    ranks = found["data_parallel_size"]
    blocks = [[f"{found['world_size']} processes, {ranks} data-parallel ranks"]]
    if found["parameters"]:
        counts = found["parameters"]
        rows = [[f"  {name}", f"{count:,}"] for name, count in counts.items() if count]
        blocks.append(align([["parameters", f"{sum(counts.values()):,}"], *rows]))
    if found["memory"]:
        blocks.append(align(_memory_rows(found["memory"])))
    if found["data"]:
        blocks.append(_data_lines(found))
    if found["verdict"]:
        blocks.append([found["verdict"]])
    if found["missing"]:
        blocks.append([f"not known here: {text}" for text in found["missing"]])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _memory_rows(memory: dict[str, Any]) -> list[list[str]]:
    """GiB by component, a column for each pipeline stage up to three: first, fullest, last."""
    stages, fullest = memory["stages"], memory["fullest_stage"]
    shown = sorted({0, fullest, len(stages) - 1})
    names = [f"stage {i}{' (fullest)' if i == fullest else ''}" for i in shown]
    rows = [[f"GiB a rank, rows of {memory['row_tokens']:,} tokens", *names]]
    for part in stages[0]:
        if any(stages[i][part] for i in shown):
            rows.append([f"  {part}", *(f"{stages[i][part] / GIB:.1f}" for i in shown)])
    return rows


def _data_lines(found: dict[str, Any]) -> list[str]:
    from megatron_prefix.text import align

    data, pipeline = found["data"], found["pipeline"]
    lines = [
        f"a step, over the first {data['steps_read']}: {data['groups_per_step']:,.1f} groups, "
        f"{data['pairs_per_step']:,.1f} pairs; at most {data['rows_per_rank']} rows a rank, "
        f"{data['tokens_per_row']:,.0f} tokens a row, the longest {data['longest_row']:,}",
        f"pipeline bubble {100 * pipeline['bubble']:.1f} % of the time that stages compute",
    ]
    table = [["sharing", "tokens a step", "of none", "forward TFLOP", "of none"]]
    none = data["sharing"]["none"]
    for mode, cost in data["sharing"].items():
        row = [f"  {mode}", f"{cost['tokens']:,.0f}", f"{cost['tokens'] / none['tokens']:.2f} x"]
        if cost["forward_flops"] is not None:
            ratio = cost["forward_flops"] / none["forward_flops"]
            row += [f"{cost['forward_flops'] / 1e12:,.3f}", f"{ratio:.2f} x"]
        table.append(row if len(row) == 5 else [*row, "", ""])
    return lines + align(table)
