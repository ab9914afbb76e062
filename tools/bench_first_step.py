"""Time from a run's start to its first step, by the number of groups in its packed steps.

    python tools/bench_first_step.py --groups 1000 10000000

Data sets are synthetic: the same 1,000 groups, repeated. `pack` writes the packed steps of each,
and `train` runs one step of each in turn, in a process of its own. Everything is included:
imports, the checks of packed steps and data, the model, the step.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_common import publish

from megatron_prefix.data import Pair, ResponsePath
from megatron_prefix.data.store import Block, DatasetWriter
from megatron_prefix.data.tokenize.tokenizers import ByteTokenizer
from megatron_prefix.data.tree import merge_paths

RUN = """
data: {{train: {data}, plan: {plan}, row_capacity: 2048, global_batch_size: 16, seed: 1}}
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: 1, seed: 1}}
logging: {{output: {output}}}
"""
BLOCK = 1000
"""Groups written at a time."""


def write(prefix: Path, num_groups: int) -> None:
    """`num_groups` groups of two answers."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(BLOCK):
        prompt = rng.integers(0, 256, int(rng.integers(4, 40)))
        first = rng.permutation(256)[:2]
        paths = [
            ResponsePath(tokens=np.append(prompt, [own, *answer, 257]), loss_start=len(prompt))
            for own, answer in zip(first, rng.integers(0, 256, (2, 8)), strict=True)
        ]
        groups.append(merge_paths(paths, [Pair(chosen=0, rejected=1)]))
    block = Block.of_paths(groups, range(BLOCK))
    with DatasetWriter(prefix, ByteTokenizer().describe()) as writer:
        for _ in range(num_groups // BLOCK):
            writer.add_block(block)
            block.columns["group_records"] = block.columns["group_records"] + BLOCK
        writer.finish({"num_records": num_groups})


def package(*arguments: str | int | Path) -> float:
    """Seconds that a command of the package takes."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "megatron_prefix", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[1_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {count: [] for count in args.groups}
    with tempfile.TemporaryDirectory() as name:
        for count in args.groups:
            folder = Path(name) / str(count)
            folder.mkdir()
            write(folder / "data", count)
            config = RUN.format(
                data=folder / "data", plan=folder / "plan", output=folder / "output"
            )
            (folder / "run.yaml").write_text(config, encoding="utf-8")
            sizes = ("--row-capacity", 2048, "--global-batch-size", 16, "--seed", 1)
            package("pack", folder / "data", "--output", folder / "plan", *sizes)
        for _ in range(args.rounds):
            for count in args.groups:
                seconds[count].append(
                    package("train", "--config", Path(name) / f"{count}/run.yaml")
                )
    first = seconds[args.groups[0]]
    rows = [
        {
            "groups": f"{count:,}",
            "start to the end of one step, over the first": f"{statistics.median(ratios):.2f}",
            "range": f"{min(ratios):.2f}-{max(ratios):.2f}",
        }
        for count, times in seconds.items()
        for ratios in [[a / b for a, b in zip(times, first, strict=True)]]
    ]
    publish("first_step", rows, f"`train` of one step, {args.rounds} rounds in turn.")


if __name__ == "__main__":
    main()
