"""The first commands on a GPU: their limits, their tables, and that what they call is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "tools"))
import gpu_half_hour as module  # noqa: E402
from bench_model import SIZES  # noqa: E402
from gpu_half_hour import CHECKS, Check, run_all, seen_in_table, seen_of_tests  # noqa: E402

from megatron_prefix.config import ModelConfig, ParallelConfig  # noqa: E402
from megatron_prefix.estimate.hardware import GIB, named_hardware  # noqa: E402
from megatron_prefix.estimate.memory import rank_memory  # noqa: E402


@pytest.mark.parametrize("name", CHECKS)
def test_each_command_ends_within_nine_minutes(name):
    assert sum(check.limit for check in CHECKS[name]) <= module.BUDGET_S < 9 * 60
    for check in CHECKS[name]:
        if "pytest" in check.command:
            assert "--timeout" in check.command
        for word in check.command:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word
        if (tool := check.command[0]).startswith("tools/"):
            source = "".join((ROOT / x).read_text() for x in (tool, "tools/bench_model.py"))
            for flag in [x for x in check.command if x.startswith("--")]:
                assert f'"{flag}"' in source, flag


def test_the_tests_on_gpus_stop_at_their_limit():
    for path in ("Makefile", "tools/gpu_check.sh"):
        for line in (ROOT / path).read_text().splitlines():
            if "-m gpu" in line and "tests/gpu" in line:
                assert f"--timeout {module.TEST_LIMIT_S}" in line, (path, line)


def test_layers_that_commands_name_fit_an_h100():
    """Weights, gradients and Adam of a 7b model of 8 layers fit; of 16 they do not."""
    places = [*ROOT.glob("docs/*.md"), *ROOT.glob("tools/*.py"), ROOT / "tools/gpu_check.sh"]
    pattern = r"--size[\", ]+(7b)[\", ]+--num-layers[\", ]+(\d+)"
    named = {int(n) for p in places for _, n in re.findall(pattern, p.read_text())}
    assert named == {8}
    machine = named_hardware("H100")
    for layers, fits in ((8, True), (16, False)):
        model = replace(ModelConfig(**SIZES["7b"].model), num_layers=layers)
        needed = rank_memory(
            model,
            model.sizes(),
            ParallelConfig(),
            vocab_size=SIZES["7b"].vocab_size,
            world_size=1,
            row_tokens=SIZES["7b"].row_capacity,
            stage=0,
            has_reference=True,
        )
        assert (needed.total / GIB <= machine.usable_gib) is fits, needed


def python(code: str, limit: int = 30, read=seen_of_tests) -> Check:
    return Check(f"fact {code[:5]}", "all pass", ("-c", code), limit, read)


def test_the_table_grows_line_by_line(tmp_path, capsys):
    """Also after a check that fails, one that is stopped, and if no time is left."""
    folder = tmp_path / "benchmarks" / "results"
    checks = [
        python("print('3 passed, 1 skipped in 2.00s')"),
        python("print('1 failed, 2 passed in 2.00s'); raise SystemExit(1)"),
        python("print('1 passed in 1s', flush=True); import time; time.sleep(60)", limit=1),
    ]
    assert not run_all("x", checks, folder, budget=60)
    lines = (folder / "gpu_x.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[2:4] for line in lines] == [
        ["3 passed, 1 skipped in 2.00s", "yes"],
        ["1 failed, 2 passed in 2.00s", "NO"],
        ["stopped after 1 s; 1 passed in 1s", "NO"],
    ]
    assert "1 failed" in (folder / "gpu_x_2.txt").read_text()
    assert run_all("y", checks[:1], folder)
    assert not run_all("z", checks[:1], folder, budget=0)
    assert "not run: no time left" in (folder / "gpu_z.md").read_text()
    assert "| fact |" in capsys.readouterr().out


def test_pytest_that_runs_nothing_is_not_as_expected():
    assert seen_of_tests("20 skipped in 1.00s", 0) == ("20 skipped in 1.00s", False)
    assert seen_of_tests("no tests", 5) == ("no result, exit code 5", False)


def test_values_of_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert seen_in_table("a", "reached", 90, 2) == ("no table, exit code 2", False)

    def write(*rows):
        (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))

    write({"reached": "98.7 %"}, {"reached": "91 %"})
    assert seen_in_table("a", "reached", 90, 0) == ("98.7 %, 91 %", True)
    assert seen_in_table("a", "reached", 95, 0)[1] is False
    write({"reached": "98.7 %"}, {"note": "out of memory"})
    assert seen_in_table("a", "reached", 90, 0) == ("98.7 %, out of memory", False)


def test_the_script_knows_the_four_names(tmp_path):
    """With a stand-in for Python, which prints its arguments."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    for name in CHECKS:
        result = subprocess.run(
            ["sh", str(ROOT / "tools/gpu_check.sh"), name],
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in), "OUT": str(tmp_path / "out")},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert f"tools/gpu_half_hour.py {name}" in result.stdout
