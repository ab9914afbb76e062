"""How full packed rows are in `rows_per_step` mode.

python tools/bench_packing.py --data hh --row-capacity 4096
"""

from __future__ import annotations

import argparse

from bench_common import publish

from megatron_prefix.data.steps.compositions import RowBatches
from megatron_prefix.data.steps.compositions.row_batches import WINDOW
from megatron_prefix.data.steps.sharing import group_lengths
from megatron_prefix.data.store import PreferenceDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, nargs="+", metavar="PREFIX")
    parser.add_argument("--row-capacity", type=int, default=4096, help="tokens")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024, WINDOW])
    parser.add_argument("--epochs", type=int, default=5, help="seeded packings to average over")
    args = parser.parse_args()
    rows = []
    for prefix in args.data:
        dataset = PreferenceDataset(prefix)
        lengths = group_lengths(dataset, "tree")
        for window in args.windows:
            batches = RowBatches(
                lengths, args.row_capacity, 1, dataset.fingerprint, 0, window=window
            )
            fills = [batches.fill(epoch) for epoch in range(args.epochs)]
            rows.append(
                {
                    "groups": len(dataset),
                    "vocabulary": dataset.vocab_size,
                    "mean tokens": f"{lengths.mean():.1f}",
                    "window": window,
                    "fill": f"{100 * sum(fills) / len(fills):.2f} %",
                    "lowest epoch": f"{100 * min(fills):.2f} %",
                }
            )
    notes = (
        f"First-fit-decreasing of whole trees into rows of {args.row_capacity} tokens, in seeded "
        f"windows of groups; mean and minimum over {args.epochs} epochs. The default window is "
        f"{WINDOW}."
    )
    publish(f"packing_{args.row_capacity}", rows, notes)


if __name__ == "__main__":
    main()
