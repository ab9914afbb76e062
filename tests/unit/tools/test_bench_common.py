"""How benchmarks keep results: row by row, in any folder, also if a case runs out of memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools"))
import bench_attention  # noqa: E402
import bench_common  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_common, "RESULTS", tmp_path)
    return tmp_path


def test_files_are_whole_after_every_row(results):
    table = bench_common.Results("some", "A note.")
    table.append({"case": "a", "time": "1.00"})
    for case in ("b", "c"):
        table.append({"case": case, "note": bench_common.NOT_RUN})
        written = json.loads((results / "some.json").read_text())
        assert written["rows"][-1]["case"] == case and written["notes"] == "A note."
        assert written["environment"] == table.environment
    lines = (results / "some.md").read_text().splitlines()
    assert lines[0] == "| case | time | note |"
    assert lines[2:4] == ["| a | 1.00 |  |", "| b |  | out of memory |"]


def test_the_commit_without_git(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.delenv(bench_common.COMMIT, raising=False)
    assert bench_common.environment()["commit"] == "unknown"
    monkeypatch.setenv(bench_common.COMMIT, "abc1234")
    assert bench_common.environment()["commit"] == "abc1234"


def test_only_out_of_memory_is_skipped(capsys):
    def fails(error):
        raise error

    assert bench_common.unless_out_of_memory(lambda: 3) == 3
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
    assert bench_common.unless_out_of_memory(lambda: fails(full)) is None
    assert "out of memory: CUDA out of memory. Tried to allocate" in capsys.readouterr().err
    with pytest.raises(ValueError):
        bench_common.unless_out_of_memory(lambda: fails(ValueError()))


def test_a_backend_that_runs_out_of_memory_does_not_stop_the_others():
    ran = []

    def step(name):
        def run():
            ran.append(name)
            if name == "b":
                raise torch.OutOfMemoryError("full")

        return run

    steps = {(x, kind): step(x) for x in "abc" for kind in ("tree", "causal")}
    assert bench_attention.that_fit(steps, ["a", "b", "c"], False) == ["a", "c"]
    assert ran == ["a", "a", "b", "c", "c"]
    row = {"trees": "x", "tokens": 8, "gather factor": "1.00", "backend": "b"}
    args = None  # a table of nothing asks nothing
    assert bench_attention.table_entries([{**row, "of unshared": "out of memory"}], args) == []
