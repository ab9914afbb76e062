"""`megatron-prefix compare`: metric files of runs, step by step."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megatron_prefix.errors import InputError

KEYS = ("loss", "grad_norm", "rewards/margins")
NEEDED = {*KEYS, "tokens/executed", "num_pairs", "step_time_s"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "compare",
        help="metrics of runs side by side",
        description="Compare runs with the first one: the largest difference of each metric over "
        "the steps they share, tokens executed, and pairs a second; with a plot.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run (two or more)")
    parser.add_argument(
        "--output", metavar="DIR", help="also write comparison.png and comparison.md there"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the comparison; write it where asked."""
    from megatron_prefix.trackers.jsonl import read_metrics

    if len(args.runs) < 2:
        raise InputError("compare needs two runs or more")
    series = {}
    for path in args.runs:
        rows = {row["step"]: row for row in read_metrics(path) if "loss" in row}
        for step, row in rows.items():
            if missing := NEEDED - row.keys():
                raise InputError(
                    f"{path}: step {step} has no {', '.join(sorted(missing))}; give runs of "
                    "`megatron-prefix train`"
                )
        series[_name(path, series)] = rows
    steps = sorted(set.intersection(*(set(rows) for rows in series.values())))
    if not steps:
        raise InputError("the runs have no training step in common: nothing can be compared")
    text = table(series, steps)
    print(text)
    if args.output:
        output = Path(args.output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
            plot(series, output / "comparison.png")
        except OSError as error:
            raise InputError(
                f"--output {output}: {error.strerror}; name a directory that can be written"
            ) from None
        print(f"wrote {output / 'comparison.md'} and {output / 'comparison.png'}")


def _name(path: str, taken: dict) -> str:
    """The directory's name; the whole path where another run has that name."""
    name = Path(path).resolve().name
    name = path if name in taken else name
    if name in taken:
        raise InputError(f"run {path} is given twice: name two different runs")
    return name


def table(series: dict[str, dict[int, dict]], steps: list[int]) -> str:
    """A Markdown table: differences from the first run over `steps`, and throughput."""
    first, *others = series
    head = ["run", *(f"max difference of {key}" for key in KEYS), "executed tokens", "pairs/s"]
    lines = [f"{len(steps)} steps in common, compared with {first}", "", _row(head)]
    lines.append(_row("---" for _ in head))
    base = [series[first][step] for step in steps]
    lines.append(_row([first, *("" for _ in KEYS), f"{_tokens(base):,}", f"{_speed(base):.2f}"]))
    for name in others:
        rows = [series[name][step] for step in steps]
        differences = [
            np.max([abs(a[key] - b[key]) for a, b in zip(rows, base, strict=True)])  # keeps NaN
            for key in KEYS
        ]
        tokens = f"{_tokens(rows):,} ({_tokens(rows) / _tokens(base):.2f}x)"
        speed = f"{_speed(rows):.2f} ({_speed(rows) / _speed(base):.2f}x)"
        lines.append(_row([name, *(f"{d:.1e}" for d in differences), tokens, speed]))
    return "\n".join(lines)


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _tokens(rows: list[dict]) -> int:
    return sum(row["tokens/executed"] for row in rows)


def _speed(rows: list[dict]) -> float:
    """Pairs over time; the first step, which also warms up, counts only where it is alone."""
    rows = rows[1:] or rows
    return sum(row["num_pairs"] for row in rows) / sum(row["step_time_s"] for row in rows)


def plot(series: dict[str, dict[int, dict]], path: Path) -> None:
    """Loss, margin and gradient norm of every run over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KEYS), figsize=(4.6 * len(KEYS), 3.6))
    widths = [5.0, 2.6, 1.4, 0.9]
    for axis, key in zip(axes, KEYS, strict=True):
        for i, (name, rows) in enumerate(series.items()):
            steps = sorted(rows)
            values = [rows[step][key] for step in steps]
            width = widths[min(i, len(widths) - 1)]
            axis.plot(steps, values, label=name, linewidth=width, alpha=0.45 if i == 0 else 0.9)
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
