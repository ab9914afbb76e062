"""What torchrun is told when a process ends with a message."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prefix.__main__ import main
from megatron_prefix.testing import free_port


@pytest.mark.parametrize("rank", ["0", "3"])
@pytest.mark.parametrize("argv", [["plan", "--config", "absent.yaml"], ["plan", "--colour"]])
def test_the_message_is_where_torchrun_reads_it(argv, rank, tmp_path, monkeypatch, capsys):
    """Every rank leaves it, because torchrun shows that of the rank that ended first."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("RANK", rank)
    start = int(time.time())
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    message = json.loads(path.read_text(encoding="utf-8"))["message"]
    printed = capsys.readouterr().err
    assert message["message"] == message["extraInfo"]["py_callstack"]
    assert start <= int(message["extraInfo"]["timestamp"]) <= time.time()
    if rank == "0":
        assert printed.endswith(message["message"] + "\n")
    else:
        assert printed == "" and ": error: " in message["message"]


def test_a_file_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "absent" / "error.json"))
    assert main(["plan", "--config", "absent.yaml"]) == 2
    assert capsys.readouterr().err.count(": error: ") == 1


@pytest.mark.slow
def test_the_message_comes_last_under_torchrun(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        + [f"--master-port={free_port()}", "-m", "megatron_prefix"]
        + ["train", "--config", str(tmp_path / "absent.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    *_, last, border = run.stderr.rstrip().splitlines()
    assert run.returncode == 1 and set(border) == {"="}
    assert last.strip().startswith("traceback : megatron-prefix train: error: config ")
    assert last.endswith("give --config an existing file")
