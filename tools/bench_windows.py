"""Sliding windows: keys that are gathered, keys that travel between ranks, and time.

A window of w tokens counts positions along the root path. Ancestors that no query of a piece sees
are not gathered, and `needed_rows` does not send them. For every row:

    area        visible (query, key) entries, over those without a window
    gathered    gathered keys over the row's tokens (the gather factor)
    received    keys that 8 context-parallel ranks receive, over an all-gather
    time        forward and backward of `path` without a window over that with it, in turn

    python tools/bench_windows.py --rows 8192 32768
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from bench_attention import in_turn, inputs, step_of
from bench_common import publish
from bench_shapes import fill, shapes

from megatron_prefix.attention import TreePlan
from megatron_prefix.attention.context_parallel import ContextCost, ownership
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.layout import TreeLayout

RANKS = 8
COST = ContextCost.of_layer(
    hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_groups=8, head_dim=128, key_bytes=8
)
"""A layer of Mistral-7B in bfloat16."""


def received(layout: TreeLayout, window: int | None) -> float:
    """Keys that the ranks receive in all, over those of an all-gather."""
    missing = -layout.num_tokens % RANKS
    if missing:
        layout = TreeLayout.concat([layout, TreeLayout.from_parents([missing], [-1])])
    cost = replace(COST, windows={window: 1.0})
    parts = ownership.tree_aware(layout, RANKS, cost)
    keys = sum(len(needed_tokens(layout, own, window)) - len(own) for own in parts)
    return keys / (layout.num_tokens * (RANKS - 1))


def measure(name: str, layout: TreeLayout, args: argparse.Namespace) -> list[dict]:
    windows = [None, *(w for w in args.windows if w < layout.longest_path)]
    whole = TreePlan(layout, args.device)
    plans = {window: whole.windowed(window) for window in windows}
    seconds = {}
    if layout.num_tokens <= args.timed_up_to:
        tensors = inputs(layout.num_tokens, args)
        steps = {("path", w): step_of(plan, "path", tensors) for w, plan in plans.items()}
        seconds = in_turn(steps, args.rounds, args.device == "cuda")
    rows = []
    for window, plan in plans.items():
        row = {
            "trees": name,
            "tokens": layout.num_tokens,
            "longest path": layout.longest_path,
            "window": window or "none",
            "area": f"{layout.area(window) / layout.area():.3f}",
            "gathered": f"{plan.path.gather_factor:.2f}",
            "received": f"{100 * received(layout, window):.1f} %",
        }
        if seconds:
            ratio = np.median(seconds["path", None] / seconds["path", window])
            row["time none / window"] = f"{ratio:.2f}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768], help="tokens")
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--trees", nargs="+", choices=list(shapes()))
    parser.add_argument(
        "--timed-up-to", type=int, default=8192, help="tokens of rows that are timed"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    trees = args.trees or ["Capybara", "2048 + 2 x 1024", "16384 + 4 x 1024", "64 turns"]
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.heads, args.groups, args.head_dim, args.dtype = 4, 2, 64, "float32"
    rows = []
    for name in trees:
        for num_tokens in args.rows:
            layout = fill(shapes()[name](np.random.default_rng(0)), num_tokens)
            rows += [] if layout is None else measure(name, layout, args)
    publish("windows", rows, "Attention of one layer with 4 query heads and 2 groups of 64.")


if __name__ == "__main__":
    main()
