"""torchrun restarts a run in its own job: it resumes exactly, and owns its directories again."""

from __future__ import annotations

import pytest
from commands import command, launch, lines, write_config

LIMIT_S = 300
FATAL = """
import os, signal, sys
from megatron_prefix.__main__ import main
from megatron_prefix.trackers.jsonl import JsonlTracker

write = JsonlTracker._write

def writing(self, line):
    write(self, line)
    if line.startswith('{"step": 3,') and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

JsonlTracker._write = writing
sys.exit(main())
"""
"""The program, whose rank 0 is killed in step 3 of the first attempt."""


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--standalone",), marks=pytest.mark.slow)], ids=["static", "c10d"]
)
def test_a_run_that_is_killed_is_restarted_and_ends(dataset, tmp_path, capsys, flags):
    script = tmp_path / "fatal.py"
    script.write_text(FATAL)
    steps = {"steps": 6, "save_interval": 1}
    argv = [
        "train",
        "--config",
        write_config(tmp_path / "a.yaml", dataset, tmp_path / "run", train=steps),
    ]
    run = launch(argv, tmp_path / "log", (str(script),), ("--max-restarts=2", *flags))
    assert run.wait(LIMIT_S) == 0, run.text()[-4000:]
    assert run.text().count("taken over from a run that was killed") == 2, "both directories"
    assert "resumed from" in run.text() and not run.pids()
    straight = write_config(tmp_path / "b.yaml", dataset, tmp_path / "straight", train=steps)
    assert command(["train", "--config", straight], capsys)[0] == 0
    history, expected = lines(tmp_path / "run"), lines(tmp_path / "straight")
    assert [row["step"] for row in history] == [row["step"] for row in expected]
    for ours, theirs in zip(history, expected, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-4 * max(theirs["loss"], 1e-2)
