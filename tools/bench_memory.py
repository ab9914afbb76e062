"""Peak memory of a build, by the number of records: it should not grow.

    python tools/bench_memory.py --records 10000 100000 1000000

Every build runs in a process of its own, forked from this one before anything is built. The
records are synthetic, have about 100 bytes each, and are in one file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
from pathlib import Path

from bench_common import publish

from megatron_prefix.data.build import build_dataset


def write(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {"prompt": f"Question {i}: ", "chosen": f"yes, {i % 97}", "rejected": "no"}
            file.write(json.dumps(row) + "\n")


def peak(path: Path, output: Path, queue) -> None:
    """Put into `queue` the peak memory before and after a build, in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    build_dataset([path], "bytes", output)
    queue.put((before / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    rows, first = [], None
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "in.jsonl"
        for count in args.records:
            write(path, count)
            queue = context.Queue()
            child = context.Process(target=peak, args=(path, Path(name) / "out", queue))
            child.start()
            before, most = queue.get()
            child.join()
            first = first or most
            rows.append(
                {
                    "records": f"{count:,}",
                    "input": f"{path.stat().st_size / 2**20:.0f} MiB",
                    "before the build": f"{before:.0f} MiB",
                    "peak": f"{most:.0f} MiB",
                    "over the first": f"{most / first:.2f}",
                }
            )
    publish("memory", rows, "Bytes as tokens, one worker; imported modules count as well.")


if __name__ == "__main__":
    main()
