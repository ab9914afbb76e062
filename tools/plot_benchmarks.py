"""Figures from the results of benchmarks: speedup by prompt over response, and the ideal.

A pair with p tokens of prompt and c tokens of each response has 2 (p + c) tokens unshared and
p + 2 c shared. So its linear layers can be at most 2 (r + 1) / (r + 2) times faster, with
r = p / c: this is the curve. Points are data sets at their medians: measured, and by the FLOP
model.

    python tools/plot_benchmarks.py                 # benchmarks/results -> docs/images
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from bench_common import RESULTS
from bench_shapes import SETS

IMAGES = RESULTS.parent.parent / "docs" / "images"
PREFIX = "lengths of "


def ideal(ratio: np.ndarray) -> np.ndarray:
    """Largest speedup of linear layers if two responses share a prompt."""
    return 2 * (ratio + 1) / (ratio + 2)


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def draw_training(name: str, output: Path) -> Path:
    """Speedup of a whole step by sharing, for the ratios of the published sets."""
    from matplotlib.figure import Figure

    results = read(name)
    measured = [row for row in results["rows"] if "time none/tree" in row]
    rows = [row for row in measured if row["data"].startswith(PREFIX)]
    ratios = np.array([SETS[row["data"].removeprefix(PREFIX)][1] for row in rows])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    curve = np.geomspace(0.15, 16, 100)
    axes.plot(curve, ideal(curve), color="0.6", label="linear layers alone, ideal")
    modelled = [float(row["FLOP none/tree"]) for row in rows]
    measured = [float(row["time none/tree"]) for row in rows]
    axes.plot(ratios, modelled, "o", mfc="none", color="tab:blue", label="FLOP model")
    axes.plot(ratios, measured, "x", color="tab:red", label="measured")
    for row, ratio, height in zip(rows, ratios, modelled, strict=True):
        label = row["data"].removeprefix(PREFIX)
        axes.annotate(label, (ratio, height), (-8, 6), textcoords="offset points", ha="right")
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axes.minorticks_off()
    axes.set_ylim(1, 2)
    axes.set_xlabel("median prompt tokens over response tokens")
    axes.set_ylabel("speedup of a whole step over unshared packing")
    axes.set_title(f"Sharing the prompt of pairs, {results['environment']['device']}", fontsize=10)
    axes.legend(loc="lower right", frameon=False)
    path = output / f"{name}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def draw_scaling(name: str, output: Path) -> Path:
    """Cost of a tree as it grows, by responses and by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, table in zip(figure.subplots(1, 2), ("responses", "length"), strict=True):
        rows = [row for row in read(f"{name}_{table}")["rows"] if "FLOP" in row]
        x = np.array([row[table] for row in rows])
        for column, style in (
            ("tokens", "-"),
            ("kept for backward", "--"),
            ("FLOP", ":"),
            ("time", "x"),
        ):
            axes.plot(x, [float(row[column]) for row in rows], style, label=column)
        if table == "responses":
            both = [row for row in rows if "unshared: tokens" in row]
            unshared = [float(row["unshared: tokens"]) * float(row["tokens"]) for row in both]
            axes.plot([row[table] for row in both], unshared, color="0.6", label="tokens, unshared")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(x, [str(n) for n in x])
        axes.set_xlabel("responses of one prompt" if table == "responses" else "tokens of a pair")
        axes.set_ylabel("over the first")
        axes.legend(frameon=False, fontsize=8)
    path = output / f"{name}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="whose results")
    parser.add_argument("--output", type=Path, default=IMAGES)
    args = parser.parse_args()
    for draw, name in ((draw_training, "training"), (draw_scaling, "scaling")):
        print(draw(f"{name}_{args.device}", args.output))


if __name__ == "__main__":
    main()
