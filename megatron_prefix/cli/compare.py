"""`megatron-prefix compare`: the metric files of several runs, step by step."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

KEYS = ("loss", "grad_norm", "rewards/margins")
NEEDED = {*KEYS, "tokens/executed", "num_pairs", "step_time_s"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser(
        "compare",
        help="metrics of several runs side by side",
        description="Compare runs with the first one: the largest difference of each metric over "
        "their common steps, executed tokens, and pairs per second; with a plot.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run (two or more)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="also write report.html, comparison.png and comparison.md to DIR",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the comparison, and write it to --output."""
    from megatron_prefix.report import compare_runs
    from megatron_prefix.trackers import read_metrics

    if len(args.runs) < 2:
        raise InputError(f"{len(args.runs)} run is given: compare needs two runs or more")
    series: dict[str, dict[int, dict]] = {}
    for path in args.runs:
        lines = {line["step"]: line for line in read_metrics(path) if "loss" in line}
        for step, line in lines.items():
            if missing := NEEDED - line.keys():
                raise InputError(
                    f"{path}: step {step} has no {', '.join(sorted(missing))}; give runs of "
                    "`megatron-prefix train`"
                )
        series[_name(path, series)] = lines
    steps = sorted(set.intersection(*(set(lines) for lines in series.values())))
    if not steps:
        raise InputError("the runs have no training step in common: give runs that overlap")
    text = table(series, steps)
    print(text)
    if args.output:
        output = Path(args.output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
            plot(series, output / "comparison.png")
            report = compare_runs(args.runs, list(series), output)
        except OSError as error:
            raise InputError(
                f"--output {output}: {error.strerror}; name a directory that can be written"
            ) from None
        written = [output / "comparison.md", output / "comparison.png", report]
        print(f"wrote {', '.join(map(str, written))}")


def _name(path: str, taken: dict) -> str:
    """The directory's name; the whole path if another run has that name."""
    name = Path(path).resolve().name
    name = path if name in taken else name
    if name in taken:
        raise InputError(f"run {path} is given twice: name different runs")
    return name


def table(series: dict[str, dict[int, dict]], steps: list[int]) -> str:
    """A Markdown table: differences from the first run over `steps`, and throughput."""
    first, *others = series
    header = ["run", *(f"max difference of {key}" for key in KEYS), "executed tokens", "pairs/s"]
    lines = [f"{counted(len(steps), 'step')} in common, compared with {first}", "", _line(header)]
    lines.append(_line("---" for _ in header))
    base = [series[first][step] for step in steps]
    lines.append(_line([first, *("" for _ in KEYS), f"{_tokens(base):,}", f"{_speed(base):.2f}"]))
    for name in others:
        metrics = [series[name][step] for step in steps]
        differences = [
            _largest(abs(a[key] - b[key]) for a, b in zip(metrics, base, strict=True))
            for key in KEYS
        ]
        tokens = f"{_tokens(metrics):,} ({_tokens(metrics) / _tokens(base):.2f}x)"
        speed = f"{_speed(metrics):.2f} ({_speed(metrics) / _speed(base):.2f}x)"
        lines.append(_line([name, *(f"{d:.1e}" for d in differences), tokens, speed]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _largest(values: Iterable[float]) -> float:
    """The largest value; NaN if any value is NaN, which `max` alone could miss."""
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _tokens(metrics: list[dict]) -> int:
    return sum(step["tokens/executed"] for step in metrics)


def _speed(metrics: list[dict]) -> float:
    """Pairs per second. The first step, which also warms up, counts only if it is alone."""
    metrics = metrics[1:] or metrics
    return sum(step["num_pairs"] for step in metrics) / sum(step["step_time_s"] for step in metrics)


def plot(series: dict[str, dict[int, dict]], path: Path) -> None:
    """Loss, margin and gradient norm of every run over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KEYS), figsize=(4.6 * len(KEYS), 3.6))
    widths = [5.0, 2.6, 1.4, 0.9]
    for axis, key in zip(axes, KEYS, strict=True):
        for i, (name, metrics) in enumerate(series.items()):
            steps = sorted(metrics)
            values = [metrics[step][key] for step in steps]
            width = widths[min(i, len(widths) - 1)]
            axis.plot(steps, values, label=name, linewidth=width, alpha=0.45 if i == 0 else 0.9)
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
