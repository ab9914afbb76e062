"""The first commands on a GPU: each takes less than nine minutes and ends with one table.

    python tools/gpu_half_hour.py first      # flash against dense, a run against CPU, whole steps
    python tools/gpu_half_hour.py second     # every sharing mode, flex, a profile of a step
    python tools/gpu_half_hour.py third      # the table that `auto` reads, other lengths
    python tools/gpu_half_hour.py fourth     # two GPUs or more: layouts over NCCL

The table has a line per fact: what is expected, and what was seen. It is written after every line
to benchmarks/results/gpu_NAME.md, and the output of each command to gpu_NAME_NUMBER.txt beside it.
A command that takes longer than its limit is stopped, and the next one begins. Exits with 1 if
something is not as expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench_common import RESULTS

BUDGET_S = 530
"""Seconds of all commands together; a machine is often lent for ten minutes a command."""
TEST_LIMIT_S = 120
"""Seconds of a single test."""
Seen = tuple[str, bool]
"""What was seen, and whether it is as expected."""


class Check(NamedTuple):
    """One fact, and the command that shows it; `limit` in seconds."""

    fact: str
    expected: str
    command: tuple[str, ...]
    limit: int
    read: Callable[[str, int], Seen]
    """From the output and the exit code."""


def tests(fact: str, limit: int, *arguments: str) -> Check:
    """A fact that tests show: all of those that run must pass, and one must run."""
    pytest = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
    command = (*pytest, "--timeout", str(TEST_LIMIT_S), *arguments)
    return Check(fact, "all pass", command, limit, seen_of_tests)


def seen_of_tests(output: str, code: int) -> Seen:
    """pytest's last line."""
    lines = re.findall(r"^.*\d+ (?:passed|failed|skipped|error).* in [\d.:]+.*$", output, re.M)
    last = lines[-1].strip("= ") if lines else f"no result, exit code {code}"
    return last, code == 0 and "passed" in last


def table(fact: str, limit: int, name: str, column: str, least: float, *command: str) -> Check:
    """A fact that a benchmark shows: no value of `column` in its table is below `least`."""

    def read(output: str, code: int) -> Seen:
        return seen_in_table(name, column, least, code)

    expected = f"{column}: {least:g} or more"
    return Check(fact, expected, (*command, "--name", name), limit, read)


def seen_in_table(name: str, column: str, least: float, code: int) -> Seen:
    """The values of a column of benchmarks/results/NAME.json; rows without it are named."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"no table, exit code {code}", False
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    values = [row[column] for row in rows if column in row]
    notes = sorted({row["note"] for row in rows if "note" in row})
    numbers = [float(re.findall(r"[\d.]+", value)[0]) for value in values]
    seen = ", ".join([*values, *notes]) or "nothing"
    return seen, code == 0 and bool(values) and min(numbers) >= least and not notes


GPU = "tests/gpu"
STEPS = ("tools/bench_training.py", "--size", "7b", "--num-layers", "8")
ATTENTION = ("tools/bench_attention.py",)
DATA = (
    "import sys; sys.path.insert(0, 'tools'); from bench_sets import write_like; "
    "write_like('build/gpu_profile', 'TLDR', 64, 128256)"
)
CHECKS: dict[str, tuple[Check, ...]] = {
    "first": (
        tests("torch's flash operators do what the plans expect", 100, f"{GPU}/test_flash.py"),
        tests(
            "flash and path equal dense in float64, to rounding",
            120,
            f"{GPU}/test_backends.py",
            "-k",
            "flash or path",
        ),
        tests(
            "training on the GPU follows training on CPU",
            60,
            f"{GPU}/test_training_curve.py",
            "-k",
            "float32 or flash",
        ),
        table(
            "whole steps are as much faster as they have fewer operations (%)",
            150,
            "gpu_training",
            "reached",
            90,
            *STEPS,
            *("--sets", "TLDR", "--rounds", "2"),
        ),
        table(
            "attention on trees is faster than on unshared sequences (ratio)",
            100,
            "gpu_attention",
            "time unshared / tree",
            1,
            *ATTENTION,
            *("--backends", "flash", "--rows", "8192", "--rounds", "5"),
        ),
    ),
    "second": (
        tests(
            "every sharing mode follows one trajectory",
            240,
            f"{GPU}/test_numerics_cuda.py",
            "-k",
            "not flex",
        ),
        tests(
            "flex equals dense in float64, to rounding",
            190,
            f"{GPU}/test_backends.py",
            "-k",
            "flex",
        ),
        Check(
            "data for the profile is written",
            "no error",
            ("-c", DATA),
            20,
            lambda _, code: ("written" if code == 0 else f"exit code {code}", code == 0),
        ),
        table(
            "linear layers, attention and head take most of a step (%, largest first)",
            80,
            "gpu_profile",
            "share of a step",
            0,
            *("tools/profile_step.py", "--data", "build/gpu_profile", "--size", "1b"),
        ),
    ),
    "third": (
        table(
            "attention, for the table that auto reads (ratio)",
            270,
            "gpu_attention_table",
            "time unshared / tree",
            1,
            *ATTENTION,
            *("--backends", "flash", "flex", "--rows", "8192", "32768", "--rounds", "5"),
            "--update-table",
        ),
        table(
            "whole steps at the lengths of two data sets (%)",
            260,
            "gpu_training_two",
            "reached",
            90,
            *STEPS,
            *("--sets", "HH-RLHF", "TLDR", "--rounds", "2"),
        ),
    ),
    "fourth": (
        tests(
            "two GPUs follow one over NCCL: tensor, pipeline, context, data parallel",
            500,
            "tests/distributed/test_layouts.py",
            *("--timeout", "480"),
            "-k",
            "two_processes or before_they_are_saved",
        ),
    ),
}


def run(check: Check, limit: float, output: Path) -> Seen:
    """Run the command for at most `limit` seconds; its output goes to a file as it comes."""
    if limit < 1:
        return "not run: no time left", False
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *check.command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):  # it may have left processes of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = output.read_text(encoding="utf-8", errors="replace")
    if code is None:
        seen, _ = check.read(text, -signal.SIGKILL)
        return f"stopped after {limit:.0f} s; {seen}", False
    return check.read(text, code)


def report(lines: Sequence[tuple[str, str, Seen, float]]) -> str:
    """The table so far."""
    rows = ["| fact | expected | seen | as expected | seconds |", "| --- | --- | --- | --- | --- |"]
    for fact, expected, (seen, is_expected), seconds in lines:
        word = "yes" if is_expected else "NO"
        rows.append(f"| {fact} | {expected} | {seen} | {word} | {seconds:.0f} |")
    return "\n".join(rows) + "\n"


def run_all(name: str, checks: Sequence[Check], folder: Path, budget: float = BUDGET_S) -> bool:
    """Run the checks one after another and write the table after each. Whether all facts are as
    expected."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent.parent / "build").mkdir(exist_ok=True)
    began, lines = time.monotonic(), list[tuple[str, str, Seen, float]]()
    for number, check in enumerate(checks, 1):
        start = time.monotonic()
        left = min(check.limit, budget - (start - began))
        print(f"== {number}/{len(checks)} {check.fact}", flush=True)
        seen = run(check, left, folder / f"gpu_{name}_{number}.txt")
        lines.append((check.fact, check.expected, seen, time.monotonic() - start))
        (folder / f"gpu_{name}.md").write_text(report(lines), encoding="utf-8")
        print(f"   {seen[0]}", flush=True)
    print(report(lines), flush=True)
    return all(is_expected for _, _, (_, is_expected), _ in lines)


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in CHECKS:
        print(f"usage: python tools/gpu_half_hour.py {'|'.join(CHECKS)}", file=sys.stderr)
        return 2
    name = sys.argv[1]
    return 0 if run_all(name, CHECKS[name], RESULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
