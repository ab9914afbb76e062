"""Rows for benchmarks: pairs as in six published sets, many responses, deep trees.

The prefix-sharing paper gives each set's median tokens of prompt and response together and the
median ratio of prompt to response. Lengths are drawn log-normal around these medians; the spread
(standard deviation of the logarithm) is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from megatron_prefix.layout import TreeLayout

SETS = {
    "Capybara": (1160, 1.59),
    "HH-RLHF": (186, 2.15),
    "MetaMath-DPO": (872, 3.91),
    "TLDR": (416, 11.14),
    "Tulu-HelpSteer": (775, 6.34),
    "UltraFeedback": (409, 0.42),
}
"""Median tokens of prompt and response, and prompt over response (Wang and Hegde 2024)."""
LONG = ((2048, 1024, 2), (16384, 1024, 4))
"""Long answers, on which kernels reach their full rate: median tokens of a prompt and of a
response, and the number of responses."""
SPREAD = 0.5

Trees = Iterator[TreeLayout]


def medians(name: str) -> tuple[float, float]:
    """Median tokens of a prompt and of a response of one of `SETS`."""
    total, ratio = SETS[name]
    return total * ratio / (1 + ratio), total / (1 + ratio)


def sharing_trees(
    rng: np.random.Generator, prompt: float, response: float, num_responses: int
) -> Trees:
    """A prompt with `num_responses` responses, around these medians."""
    while True:
        lengths = np.array([prompt] + [response] * num_responses)
        lengths = lengths * np.exp(SPREAD * rng.standard_normal(len(lengths)))
        yield TreeLayout.from_parents(
            np.maximum(lengths, 2).astype(int), [-1] + [0] * num_responses
        )


def deep_trees(rng: np.random.Generator, num_turns: int, turn: float) -> Trees:
    """Conversations of `num_turns` turns with one rejected reply at each turn."""
    while True:
        lengths, parents, last = [], [], -1
        for _ in range(num_turns):
            chosen = len(lengths)
            parents += [last]
            lengths += [turn]
            parents += [chosen]
            lengths += [turn]
            last = chosen
        drawn = np.array(lengths) * np.exp(SPREAD * rng.standard_normal(len(lengths)))
        yield TreeLayout.from_parents(np.maximum(drawn, 2).astype(int), parents)


def shapes() -> dict[str, Callable[[np.random.Generator], Trees]]:
    """Every kind of tree by its name."""
    kinds: dict = {}
    for name in SETS:
        prompt, response = medians(name)
        kinds[name] = lambda rng, p=prompt, r=response: sharing_trees(rng, p, r, 2)
    for num_responses in (4, 8):
        kinds[f"K = {num_responses}"] = lambda rng, n=num_responses: sharing_trees(rng, 512, 256, n)
    for prompt, response, count in LONG:
        name = f"{prompt} + {count} x {response}"
        kinds[name] = lambda rng, p=prompt, r=response, n=count: sharing_trees(rng, p, r, n)
    kinds["8 turns"] = lambda rng: deep_trees(rng, 8, 96)
    kinds["64 turns"] = lambda rng: deep_trees(rng, 64, 96)
    return kinds


def fill(trees: Trees, num_tokens: int) -> TreeLayout | None:
    """A row of trees up to the first that does not fit; None if not even one fits."""
    row, used = [], 0
    while used + (tree := next(trees)).num_tokens <= num_tokens:
        row.append(tree)
        used += tree.num_tokens
    return TreeLayout.concat(row) if row else None


def unshared(layout: TreeLayout) -> TreeLayout:
    """Every root-to-leaf path of `layout` as a sequence of its own."""
    ends = layout.first_positions.astype(np.int64) + layout.lengths
    paths = ends[layout.leaf_mask]
    return TreeLayout.from_parents(paths, [-1] * len(paths))


def first_paths(sequences: TreeLayout, most_tokens: int) -> TreeLayout:
    """The first of these sequences, at least one, up to `most_tokens` tokens."""
    count = max(int((np.cumsum(sequences.lengths, dtype=np.int64) <= most_tokens).sum()), 1)
    return TreeLayout.from_parents(sequences.lengths[:count], [-1] * count)


def plain_causal(area: int) -> TreeLayout:
    """One sequence with `area` visible pairs, as nearly as lengths allow."""
    return TreeLayout.from_parents([max(round(((8 * area + 1) ** 0.5 - 1) / 2), 1)], [-1])


def tiled_area(layout: TreeLayout, q_tile: int, kv_tile: int) -> int:
    """Pairs that a kernel computes in whole tiles: leaf paths, bottom-right causal.

    In a piece with n queries and m keys, tile i of queries needs keys up to
    m - n + min((i + 1) q_tile, n), rounded up to whole tiles. With tiles of 4, n = 6 and m = 10:
    8 and 10 keys, so 2 and 3 tiles.
    """
    from megatron_prefix.attention.plan import build_path_plan

    plan = build_path_plan(layout, "cpu")
    total = 0
    for n, m in zip(plan.q_lengths, plan.kv_lengths, strict=True):
        ends = np.minimum(np.arange(1, -(-n // q_tile) + 1) * q_tile, n)
        total += int((-(-(m - n + ends) // kv_tile)).sum()) * q_tile * kv_tile
    return total
