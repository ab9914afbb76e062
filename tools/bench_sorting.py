"""Sharing, sorting by length, both, and packed rows: executed tokens and CPU time of an epoch.

This is the comparison of the preference-packing paper (arXiv 2602.24082). Its relative samples per
second: padded 1.00, prompt shared by a pair 1.53, sorted by length 2.62, both 3.22. Here every
variant trains the same tiny model for one epoch; after each step the next variant runs its step.

    python tools/bench_sorting.py --data hh
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings

from bench_common import publish
from tqdm import tqdm

from megatron_prefix.config import Config, parse_config
from megatron_prefix.data.store import PreferenceDataset

PAPER = {"padded": "1.00", "shared": "1.53", "sorted": "2.62", "shared and sorted": "3.22"}


def variants(args: argparse.Namespace) -> dict[str, dict]:
    """Settings of `data` that differ. A shared sequence has a pair, an unshared one has a side."""
    padded = {"packing": False, "sharing": "none", "micro_batch_size": 2 * args.pairs}
    shared = {"packing": False, "sharing": "pair", "micro_batch_size": args.pairs}
    return {
        "padded": padded,
        "shared": shared,
        "sorted": {**padded, "sort_by_length": True},
        "shared and sorted": {**shared, "sort_by_length": True},
        "packed rows of trees": {"row_capacity": args.row_capacity},
        "packed rows of trees, sorted": {
            "row_capacity": args.row_capacity,
            "sort_by_length": True,
        },
    }


def make_config(args: argparse.Namespace, data: dict, output: str) -> Config:
    size = args.hidden_size
    return parse_config(
        {
            "data": {
                "train": args.data,
                "global_batch_size": args.global_batch_size,
                **data,
            },
            "model": {
                "num_layers": args.num_layers,
                "hidden_size": size,
                "ffn_hidden_size": 3 * size,
                "num_attention_heads": size // 32,
                "make_vocab_size_divisible_by": 1,
                "attention_backend": "path",
            },
            "optimizer": {"lr": 1e-5},
            "train": {"epochs": 1},
            "logging": {"output": output},
        }
    )


def measure(args: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """(executed tokens, CPU seconds) of each variant's epoch."""
    from megatron_prefix.distributed import join_world
    from megatron_prefix.train.setup import prepare_trainer

    dataset = PreferenceDataset(args.data)
    with tempfile.TemporaryDirectory() as scratch:
        configs = {
            name: make_config(args, data, f"{scratch}/{number}")
            for number, (name, data) in enumerate(variants(args).items())
        }
        with join_world(configs["padded"].parallel, 0) as world:
            runs = {name: prepare_trainer(c, dataset, None, world) for name, c in configs.items()}
            totals = {name: [0, 0.0] for name in runs}
            for step in tqdm(range(runs["padded"].num_steps), desc="steps", disable=None):
                for name, run in runs.items():
                    rows = run.sampler.micro_batches(run.sampler.step(step))
                    totals[name][0] += sum(len(row.tokens) for row in rows)
                    start = time.process_time()
                    run.train_step()
                    totals[name][1] += time.process_time() - start
    return {name: (tokens, seconds) for name, (tokens, seconds) in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="PREFIX", help="data set that build wrote")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--row-capacity", type=int, default=4096, help="tokens")
    parser.add_argument("--global-batch-size", type=int, default=64, help="groups per step")
    parser.add_argument("--pairs", type=int, default=8, help="per padded micro batch")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    totals = measure(args)
    tokens, seconds = totals["padded"]
    rows = [
        {
            "variant": name,
            "executed tokens": f"{count:,}",
            "padded, over its tokens": f"{tokens / count:.2f}",
            "padded, over its CPU time": f"{seconds / spent:.2f}",
            "paper, samples a second": PAPER.get(name, ""),
        }
        for name, (count, spent) in totals.items()
    ]
    notes = (
        f"One epoch of {len(PreferenceDataset(args.data))} groups, {args.global_batch_size} a "
        f"step, {args.pairs} pairs a padded micro batch; {args.num_layers} layers, hidden "
        f"{args.hidden_size}, reference computed each step, CPU, one thread."
    )
    publish("sorting", rows, notes)


if __name__ == "__main__":
    main()
