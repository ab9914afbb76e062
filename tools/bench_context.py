"""Context parallelism: balance of the work over ranks, and bytes sent, by ownership rule.

python tools/bench_context.py --data hh=build/hh oasst=build/oasst
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from bench_common import publish

from megatron_prefix.attention.context_parallel import ContextCost, ContextParallel, ownership
from megatron_prefix.attention.pieces import needed_tokens
from megatron_prefix.data.steps.sharing import view
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.layout import TreeLayout
from megatron_prefix.testing import BytesSent, free_port, random_heads

SIZES, ROWS = (2, 4, 8), (8192, 32768, 131072)
HEADS, GROUPS, HEAD_DIM = 32, 8, 128
COST = ContextCost.of_layer(
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_heads=HEADS,
    num_groups=GROUPS,
    head_dim=HEAD_DIM,
    key_bytes=2 + 2 + 4,
)
"""A layer of Llama-3 8B in bfloat16."""
RULES = {
    "contiguous": ownership.contiguous,
    "zigzag": ownership.zigzag,
    "area only": ownership.greedy_by_area,
    "tree-aware": partial(ownership.tree_aware, cost=COST),
}
TLDR_PROMPT, TLDR_RESPONSE, TLDR_SPREAD = 382, 34, 0.5
"""TLDR's published medians (416 tokens, prompt over response 11.14); the spread is assumed."""


def trees_of(prefix: str, rng: np.random.Generator) -> Iterator[TreeLayout]:
    """Trees of a data set, drawn with replacement."""
    dataset = PreferenceDataset(prefix)
    while True:
        tree = view(dataset[int(rng.integers(len(dataset)))], "tree", 0).tree
        yield TreeLayout.from_parents(tree.node_lengths, tree.parents)


def tldr_pairs(rng: np.random.Generator) -> Iterator[TreeLayout]:
    """A prompt with two summaries; log-normal lengths around TLDR's medians."""
    while True:
        medians = np.array([TLDR_PROMPT, TLDR_RESPONSE, TLDR_RESPONSE])
        lengths = np.maximum(medians * np.exp(TLDR_SPREAD * rng.standard_normal(3)), 2)
        yield TreeLayout.from_parents(lengths.astype(int), [-1, 0, 0])


def long_prompts(rng: np.random.Generator) -> Iterator[TreeLayout]:
    """A prompt of 16k tokens with four responses of 1k."""
    while True:
        yield TreeLayout.from_parents([16384] + [1024] * 4, [-1, 0, 0, 0, 0])


def fill(trees: Iterator[TreeLayout], num_tokens: int) -> TreeLayout | None:
    """A row of trees up to the first that does not fit, padded; None if not even one fits."""
    row, used = [], 0
    while used + (tree := next(trees)).num_tokens <= num_tokens:
        row.append(tree)
        used += tree.num_tokens
    if not row:
        return None
    if used < num_tokens:
        row.append(TreeLayout.from_parents([num_tokens - used], [-1]))
    return TreeLayout.concat(row)


def balance(layout: TreeLayout, size: int) -> dict[str, tuple[float, float, float]]:
    """For every rule: area and modelled time, each the largest over the mean; and keys as a share
    of those that an all-gather sends."""
    by_rule = {}
    for name, rule in RULES.items():
        rows = rule(layout, size)
        area = np.array([ownership.area_of(layout, own) for own in rows])
        keys = np.array([len(needed_tokens(layout, own)) - len(own) for own in rows])
        time = COST.per_token * layout.num_tokens / size
        time = time + COST.per_entry * area + COST.per_key * keys
        share = keys.sum() / (layout.num_tokens * (size - 1))
        by_rule[name] = (area.max() / area.mean(), time.max() / time.mean(), share)
    return by_rule


def balance_table(sources: dict, num_rows: int) -> list[dict]:
    table = []
    for name, source in sources.items():
        for num_tokens in ROWS:
            trees = source(np.random.default_rng(num_tokens))
            layouts = [x for x in (fill(trees, num_tokens) for _ in range(num_rows)) if x]
            for size in SIZES if layouts else []:
                balances = [balance(layout, size) for layout in layouts]
                entry = {"trees": name, "row": num_tokens, "ranks": size}
                for rule in RULES:
                    area, time, keys = np.mean([x[rule] for x in balances], axis=0)
                    entry[rule] = f"{area:.2f} / {time:.3f} / {100 * keys:.0f} %"
                table.append(entry)
    return table


def count_bytes(rank: int, size: int, port: int, path: str, row: TreeLayout) -> None:
    """Count the bytes that each transport sends for one layer, on one of `size` processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    rows = []
    for comm in ("all_gather", "needed_rows", "all_to_all"):
        share = ContextParallel(dist.group.WORLD, comm, COST).share(row, torch.device("cpu"))
        q, k, v, grad = random_heads(
            row.num_tokens // size, HEADS, GROUPS, HEAD_DIM, dtype=torch.bfloat16
        )
        with BytesSent(dist.group.WORLD) as sent:
            share.attend(q, k, v, "path", None).backward(grad)
        counts = torch.tensor([sent.total, share.transport.bytes_sent(HEADS, GROUPS, HEAD_DIM, 2)])
        dist.all_reduce(counts)
        counted, predicted = counts.tolist()
        rows.append(
            {
                "ranks": size,
                "transport": comm,
                "counted, MB a rank": f"{counted / size / 1e6:.2f}",
                "predicted": f"{predicted / size / 1e6:.2f}",
                "equal": counted == predicted,
            }
        )
    if rank == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(rows, file)
    dist.destroy_process_group()


def bytes_table(row: TreeLayout) -> list[dict]:
    table = []
    for size in (2, 4):
        path = f"build/bytes-{size}.json"
        torch.multiprocessing.spawn(count_bytes, (size, free_port(), path, row), nprocs=size)
        with open(path, encoding="utf-8") as file:
            table += json.load(file)
        os.remove(path)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, nargs="+", metavar="NAME=PREFIX")
    parser.add_argument("--rows", type=int, default=8, help="rows to average over")
    args = parser.parse_args()
    sets = dict(x.split("=", 1) for x in args.data)
    sources = {name: partial(trees_of, prefix) for name, prefix in sets.items()}
    sources |= {"TLDR": tldr_pairs, "16k + 4 x 1k": long_prompts}
    notes = (
        "Each cell: area, modelled time (both largest rank over mean), keys received over an "
        f"all-gather's. Mean of {args.rows} rows. A layer of Llama-3 8B in bfloat16, forward and "
        "backward, at the rates of attention/context_parallel/ownership.py; keys by needed_rows."
    )
    publish("context_balance", balance_table(sources, args.rows), notes)
    first = next(iter(sources.values()))
    row = fill(first(np.random.default_rng(0)), 4096)
    notes = (
        f"One layer, forward and backward, on a row of {row.num_tokens} tokens of "
        f"{next(iter(sources))}: {HEADS} heads, {GROUPS} key/value heads of {HEAD_DIM}, bfloat16, "
        "gloo. Keys travel again in backward; gradients of keys travel in float32."
    )
    publish("context_bytes", bytes_table(row), notes)


if __name__ == "__main__":
    main()
