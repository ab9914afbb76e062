"""Balance of data-parallel ranks: the largest modelled cost divided by the mean, per step.

    python tools/bench_balance.py --data hh chat oasst --groups-per-rank 16

Groups are drawn with replacement from each data set. The cost is the FLOP of a forward pass of
the model below (`data.steps.CostModel`). "by tokens" deals the same rows to ranks by their number
of tokens only, and is measured by the same cost.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from bench_common import publish

from megatron_prefix.config import ModelSizes
from megatron_prefix.data.steps import CostModel, Sampler
from megatron_prefix.data.steps.compositions.order import seeded
from megatron_prefix.data.steps.cost import bundle_work
from megatron_prefix.data.store import PreferenceDataset

MODEL = ModelSizes(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
)


@dataclass(frozen=True)
class Drawn:
    """Groups drawn with replacement, `batch_size` per step."""

    num_groups: int
    batch_size: int

    def groups(self, step: int) -> np.ndarray:
        return seeded("drawn", step).integers(0, self.num_groups, self.batch_size)

    def num_steps(self, epochs: int) -> int:
        return epochs


def unevenness(dataset: PreferenceDataset, ranks: int, args, by_cost: bool) -> list[float]:
    """The largest cost of a rank divided by the mean cost, for every step."""
    cost = CostModel.of_model(MODEL, args.vocabulary)
    sampler = Sampler(
        dataset=dataset,
        composition=Drawn(len(dataset), ranks * args.groups_per_rank),
        row_capacity=args.row_capacity,
        num_ranks=ranks,
        cost=cost if by_cost else None,
    )
    ratios = []
    for step in range(args.steps):
        plan = sampler.step(step)
        costs = [
            sum(bundle_work(dataset, bundle, "tree").cost(cost) for row in share for bundle in row)
            for share in plan.rows
        ]
        ratios.append(max(costs) * ranks / sum(costs))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="PREFIX")
    parser.add_argument("--row-capacity", type=int, default=16384, help="tokens")
    parser.add_argument("--groups-per-rank", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=128256)
    args = parser.parse_args()
    rows = []
    for prefix in args.data:
        dataset = PreferenceDataset(prefix)
        for ranks in args.ranks:
            ours, tokens = (unevenness(dataset, ranks, args, by) for by in (True, False))
            rows.append(
                {
                    "data": dataset.prefix.name,
                    "longest tree": int(dataset.groups_num_tokens().max()),
                    "ranks": ranks,
                    "max/mean, mean of steps": f"{np.mean(ours):.4f}",
                    "worst step": f"{max(ours):.4f}",
                    "by tokens, mean": f"{np.mean(tokens):.4f}",
                    "by tokens, worst": f"{max(tokens):.4f}",
                }
            )
    notes = (
        f"{args.steps} steps of {args.groups_per_rank} groups a rank, drawn with replacement; rows "
        f"of {args.row_capacity} tokens; cost of a forward pass of 32 layers, hidden 4096, feed-"
        f"forward 14336, 32:8 heads, vocabulary {args.vocabulary}."
    )
    publish("balance", rows, notes)


if __name__ == "__main__":
    main()
