"""Ten million groups: packing them on one core, and the first step of a run with them.

    python tools/bench_pack.py --groups 10000000

Lengths are log-normal, similar to HH-RLHF's (median 180 tokens). The data set is a stand-in with
lengths, offsets and a fingerprint, but no tokens: packing reads nothing else.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_common import publish

from megatron_prefix.data.steps import Sampler
from megatron_prefix.data.steps.compositions import StepSettings
from megatron_prefix.data.steps.packed import PackedSteps, write_packed_steps, writing

CAPACITY = 8192


class Lengths:
    """Groups of known lengths with one pair each."""

    prefix = Path("synthetic")

    def __init__(self, num_groups: int, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed).lognormal(np.log(180), 0.8, num_groups)
        self.lengths = np.clip(drawn, 8, CAPACITY).astype(np.int64)
        self.fingerprint = f"synthetic {num_groups} {seed}"
        self.group_pairs = np.arange(num_groups + 1)
        self.group_num_records = np.ones(num_groups, np.int64)
        self.pair_weights = np.ones(num_groups)

    def __len__(self) -> int:
        return len(self.lengths)

    def groups_num_tokens(self) -> np.ndarray:
        return self.lengths

    def group_num_tokens(self, group: int) -> int:
        return int(self.lengths[group])


def first_step(dataset: Lengths, path: Path, steps: int = 5) -> float:
    """Seconds from opening packed steps to the plan of the first: the least of `steps` tries."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        plan = PackedSteps(path)
        Sampler(dataset=dataset, composition=plan, row_capacity=CAPACITY).step(0)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=10_000_000)
    args = parser.parse_args()
    writing.files_seen = lambda dataset: {}  # the stand-in has no files
    rows = []
    sizes = {"rows_per_step": {"rows_per_step": 8}, "global_batch_size": {"global_batch_size": 64}}
    with tempfile.TemporaryDirectory() as folder:
        small = Lengths(1000)
        for name, size in sizes.items():
            for method in ("first-fit", "best-fit"):
                settings = StepSettings(
                    seed=0, row_capacity=CAPACITY, packing_method=method, epochs=1, **size
                )
                write_packed_steps(small, settings, Path(folder) / "small")
                large = Lengths(args.groups)
                start = time.process_time()
                manifest = write_packed_steps(large, settings, Path(folder) / "large")
                seconds = time.process_time() - start
                ratio = first_step(large, Path(folder) / "large") / first_step(
                    small, Path(folder) / "small"
                )
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                rows.append(
                    {
                        "mode": f"{name} {next(iter(size.values()))}",
                        "method": method,
                        "groups": f"{len(large):,}",
                        "within 120 s of one core": "yes" if seconds <= 120 else "no",
                        "share of 120 s": f"{100 * seconds / 120:.0f} %",
                        "peak memory so far": f"{peak:.1f} GiB",
                        "fill": f"{100 * manifest['fill']:.2f} %",
                        "first step, over 1,000 groups": f"{ratio:.2f}",
                    }
                )
    notes = (
        f"Rows of {CAPACITY} tokens; synthetic lengths, median 180; CPU time of one process, "
        "writing the plan included. The last column is the time from opening the plan to the plan "
        "of the first step, over the same for a thousand groups."
    )
    publish("pack", rows, notes)


if __name__ == "__main__":
    main()
