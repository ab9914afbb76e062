"""Fuzz of everything that is read: files are damaged or forged, and reading must end well.

    python tools/fuzz.py --seconds 600
    python tools/fuzz.py --cases 10000 --seed 7 --kinds plan forged_set

A case is (kind, seed, number), from which all of its damage follows; `--seed` and `--first` repeat
it. It ends well if the input is accepted and usable to its end, or refused with an InputError that
names the file. A traceback, a hang, a killed process, or damage that changes what is read without
being seen is a find: it is printed, and the exit code is 1. The kinds are the methods of
tests/robustness/fuzz_kinds.py, fuzz_forged.py, fuzz_adapters.py and fuzz_images.py.

Cases run in forked processes of BATCH cases each. A process may take LIMIT_S seconds per case and
MEMORY bytes.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("robustness", "helpers")]

from commands import write_config  # noqa: E402
from fuzz_images import EveryFuzz  # noqa: E402

from megatron_prefix.__main__ import main as program  # noqa: E402
from megatron_prefix.config import load_config  # noqa: E402
from megatron_prefix.distributed import join_world  # noqa: E402
from megatron_prefix.testing import write_random_set  # noqa: E402

KINDS = {
    "inputs": 6,
    "data_set": 4,
    "column": 3,
    "scores": 2,
    "saved": 2,
    "config": 2,
    "forged_set": 6,
    "plan": 3,
    "forged_plan": 4,
    "forged_scores": 2,
    "hugging_face": 3,
    "template": 3,
    "adapter": 3,
    "image_records": 3,
    "picture": 3,
    "image_set": 3,
}
"""How often each kind comes in a round."""
BATCH = 100
LIMIT_S = 40
MEMORY = 12 << 30
"""Of address space, in a process that has imported torch."""


def inputs(folder: Path) -> tuple[Path, Path, tuple[str, str]]:
    """A finished run, a sidecar, and two data sets."""
    sets = write_random_set(folder / "set", 0, 8), write_random_set(folder / "other" / "set", 1, 5)
    run, ref = folder / "run", folder / "ref"
    run.mkdir()
    config = write_config(run / "run.yaml", sets[0], run, train={"steps": 2})
    assert quietly(lambda: program(["train", "--config", config])) == 0
    config = write_config(folder / "c.yaml", sets[0], folder, data={"valid": sets[1]})
    assert quietly(lambda: program(["score", "--config", config, "--output", str(ref)])) == 0
    return run, ref, sets


def quietly(action):
    """Run `action` in a fork without its output; returns its exit code."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(action() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def child(pipe: int, folder: Path, made: tuple, cases: list[tuple[str, int]], seed: int) -> None:
    """Run cases and write a line when each begins and ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    run, ref, sets = made
    settings = load_config(write_config(folder / "c.yaml", sets[0], run))
    with join_world(settings.parallel, settings.train.seed) as world:
        fuzz = EveryFuzz(folder, run, ref, sets, world)
        for kind, number in cases:
            os.write(pipe, json.dumps(["begins", kind, number]).encode() + b"\n")
            try:
                rng = random.Random(f"{kind} {seed} {number}")
                outcome = getattr(fuzz, kind)(rng, (kind, seed, number))
                line = ["refused" if outcome is None else "accepted", kind, ""]
            except AssertionError as error:
                line = ["find", kind, str(error)[:1500]]
            except (Exception, SystemExit):  # of the kind itself
                line = ["find", kind, f"case {(kind, seed, number)}: {traceback.format_exc()}"]
            os.write(pipe, json.dumps(line).encode() + b"\n")
    os._exit(0)


def batch(made: tuple, cases: list[tuple[str, int]], seed: int, counts: collections.Counter) -> int:
    """Run cases in one process; returns how many were begun. A process that is late or dies is a
    find of the case that it was in."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            child(writing, folder, made, cases, seed)
        finally:
            os._exit(99)
    os.close(writing)
    begun, last, text = 0, ("start", 0), b""
    while True:
        ready = select.select([reading], [], [], LIMIT_S + 60 * (begun == 0))[0]
        data = os.read(reading, 1 << 16) if ready else b""
        if not data:
            break
        *lines, text = (text + data).split(b"\n")
        for outcome, kind, rest in map(json.loads, lines):
            if outcome == "begins":
                begun, last = begun + 1, (kind, rest)
                continue
            counts[kind, outcome] += 1
            last = None
            if outcome == "find":
                print(rest, flush=True)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(reading)
    shutil.rmtree(folder, ignore_errors=True)
    if last is not None or code:
        kind, number = last or ("end", 0)
        how = f"takes over {LIMIT_S} s" if not ready else f"ends its process with {code}"
        print(f"case {(kind, seed, number)} {how}", flush=True)
        counts[kind, "find"] += 1
    return begun


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="stop after this number")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    return parser.parse_args()


def main() -> int:
    args = arguments()
    warnings.simplefilter("ignore")
    if args.cases == sys.maxsize and args.seconds == float("inf"):
        args.seconds = 60
    print(f"seed {args.seed}", flush=True)
    order = [kind for kind in args.kinds for _ in range(KINDS[kind])]
    counts: collections.Counter = collections.Counter()
    started, number = time.monotonic(), args.first
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        made = inputs(Path(folder))
        end = args.first + args.cases
        while number < end and time.monotonic() - started < args.seconds:
            size = min(BATCH, end - number)
            cases = [(order[n % len(order)], n) for n in range(number, number + size)]
            number += max(batch(made, cases, args.seed, counts), 1)
    seconds = time.monotonic() - started
    for kind in args.kinds:
        row = [
            f"{counts[kind, outcome]:6} {outcome}" for outcome in ("refused", "accepted", "find")
        ]
        print(f"{kind:14} {'  '.join(row)}")
    finds = sum(n for (_, outcome), n in counts.items() if outcome == "find")
    print(f"{number - args.first} cases in {seconds:.0f} s, seed {args.seed}: {finds} finds")
    return int(finds > 0)


if __name__ == "__main__":
    sys.exit(main())
