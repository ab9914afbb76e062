"""`megatron-prefix plan`: an estimate of a run's memory and savings; needs no GPU."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from megatron_prefix.cli.options import add_config, quiet_megatron, read_config
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

if TYPE_CHECKING:
    from megatron_prefix.config import Config
    from megatron_prefix.estimate import Hardware

GIB = 2**30
MOST_PROCESSES = 2**20
PARTS = {
    "attention": "attention's buffers",
    "host_gradients": "in host memory: gradients of shadow steps",
    "host_copy": "in host memory: copy for a save in the background",
}
"""Parts of memory that need more words than their key."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "plan",
        help="parameters, memory per rank, pipeline bubble, savings by sharing; needs no GPU",
        description="Read a configuration, and its model's config.json and its data set if they "
        "are on this machine. Memory and time are computed, not measured on a GPU.",
    )
    add_config(parser)
    parser.add_argument(
        "--world-size",
        "--gpus",
        dest="world_size",
        type=int,
        metavar="N",
        help="processes, one per GPU (default: the fewest that the parallel section allows)",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="H100, H200, B200 or A100 (80 GB): whether a rank fits, and how long the run takes",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="F",
        help="share of the GPU's peak reached while it computes, 0.01 to 1 (default: 0.5); bubble, "
        "traffic and recomputation come on top",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="memory of a GPU in GiB, 6 to 4096 (default: that of --gpu): whether a rank fits",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="list the fastest layouts of --gpus processes that fit --memory or --gpu, by "
        "estimated seconds per step; needs the data set and the model's config.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    if args.world_size is not None and not 1 <= args.world_size <= MOST_PROCESSES:
        raise InputError(
            f"--world-size is {args.world_size}, but it must be at least 1 and at most "
            f"{MOST_PROCESSES:,}: give another"
        )
    config = read_config(args)
    quiet_megatron()
    from megatron_prefix.estimate import named_hardware, plan_run

    machine = named_hardware(args.gpu, args.memory, args.mfu)
    if args.search:
        print(_searched(args, config, machine))
        return
    estimate = plan_run(config, args.world_size, machine)
    print(json.dumps(estimate, indent=1) if args.json else plan_text(estimate))


def _searched(args: argparse.Namespace, config: Config, machine: Hardware | None) -> str:
    from megatron_prefix.cli.layout_table import layout_table
    from megatron_prefix.estimate import search_layouts

    if args.world_size is None or machine is None:
        raise InputError("--search needs --gpus N, and --memory GIB or --gpu NAME: add them")
    result = search_layouts(config, args.world_size, machine)
    return json.dumps(result, indent=1) if args.json else layout_table(result, args.gpu is None)


def plan_text(estimate: dict[str, Any]) -> str:
    """The estimate as text: one block for each part that is known."""
    from megatron_prefix.text import align

    ranks = estimate["data_parallel_size"]
    sizes = counted(estimate["world_size"], "process"), counted(ranks, "data-parallel rank")
    blocks = [[", ".join(sizes)]]
    if estimate["parameters"]:
        counts = estimate["parameters"]
        rows = [[f"  {name}", f"{count:,}"] for name, count in counts.items() if count]
        trained, total = estimate["trained_parameters"], sum(counts.values())
        if trained < total:
            rows.append(["trained", f"{trained:,}"])
        blocks.append(align([["parameters", f"{total:,}"], *rows]))
    if estimate["memory"]:
        blocks.append(align(_memory_rows(estimate["memory"])))
    if estimate["fit"]:
        blocks.append([_fit_line(estimate["fit"])])
    if estimate["data"]:
        blocks.append(_data_lines(estimate))
    if estimate["verdict"]:
        blocks.append([estimate["verdict"]])
    if estimate["time"]:
        blocks.append(_time_lines(estimate["time"]))
    if estimate["advice"]:
        blocks.append([f"advice: {line}" for line in estimate["advice"]])
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


def _fit_line(fit: dict[str, Any]) -> str:
    numbers = f"{fit['needed_gib']:.1f} of {fit['usable_gib']:.1f} GiB"
    of = f"usable of {fit['memory_gib']:.0f} GiB; the rest is for CUDA, NCCL and fragmentation"
    if fit["fits"]:
        return f"fits: {numbers} on the fullest rank, {fit['margin_gib']:.1f} GiB to spare ({of})"
    return f"does not fit: {numbers} on the fullest rank, {-fit['margin_gib']:.1f} missing ({of})"


TIME_PARTS = {
    "compute": "model operations",
    "recompute": "recomputation",
    "reference": "reference model",
    "tensor": "tensor-parallel traffic",
    "expert": "expert-parallel traffic",
    "context": "context-parallel traffic",
    "stages": "traffic between stages",
    "bubble": "pipeline bubble",
    "data": "data-parallel traffic, not hidden",
    "optimizer": "optimizer",
}


def _time_lines(time: dict[str, Any]) -> list[str]:
    from megatron_prefix.text import align

    sharing, total = time["sharing"], time["seconds_per_step"]
    table = [["estimated seconds per step", f"{total:.3f}", ""]]
    for key, name in TIME_PARTS.items():
        if (seconds := time["seconds"][key]) > 0:
            table.append([f"  {name}", f"{seconds:.3f}", f"{100 * seconds / total:.1f} %"])
    run = [
        f"{counted(time['steps'], 'step')} on {time['gpu']}, at {time['mfu']:.2f} of its peak "
        f"while it computes ({time['step_mfu']:.2f} over the whole step; an estimate, not a "
        "measurement):",
        f"{_length(time['hours'])}, {_number(time['gpu_hours'])} GPU-hours; "
        f"{time['tokens_per_second']:,.0f} executed tokens per second, which do the work of "
        f"{time['logical_tokens_per_second']:,.0f} without sharing",
    ]
    word = "saves" if sharing["is_on"] else "would save"
    run.append(
        f"data.sharing: {sharing['mode']} {word} {_length(sharing['saved_hours'])} of "
        f"{_length(sharing['hours_without'])} and {_number(sharing['saved_gpu_hours'])} "
        f"GPU-hours ({100 * sharing['saved_share']:.0f} %)"
    )
    return [*align(table), *run]


def _length(hours: float) -> str:
    """A time in hours, or in seconds if it is short; 0.0003: 1.08 seconds."""
    if abs(hours) < 0.1:
        return f"{_number(3600 * hours)} seconds"
    return f"{_number(hours)} hours"


def _number(hours: float) -> str:
    """Two digits after the point, or two digits that count; 1234.5: 1,234.50; 0.00123: 0.0012."""
    return f"{hours:,.2f}" if abs(hours) >= 1 else f"{hours:.2g}"


def _data_lines(estimate: dict[str, Any]) -> list[str]:
    from megatron_prefix.text import align

    data, pipeline = estimate["data"], estimate["pipeline"]
    lines = [
        f"steps: {data['num_steps']:,}",
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
    lines += align(table)
    if "training_flops" in none:
        lines += [
            f"training with sharing {mode}: {cost['training_flops'] / 1e12:,.3f} TFLOP per step, "
            f"{cost['training_flops'] / cost['full_training_flops']:.2f} of all weights"
            for mode, cost in data["sharing"].items()
        ]
    return lines
