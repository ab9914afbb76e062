"""SIGTERM ends a run after the current step, with exit code 143; a second one ends it at once.

In this process and in forks the signal comes out of the run itself, while step 3's line of
metrics is written: that is within step 3. On two processes it comes from outside, to one of them.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from commands import TIMEOUT_S, command, forked, launch, lines, write_config
from processes import start_ranks

from megatron_prefix.__main__ import main
from megatron_prefix.trackers.jsonl import JsonlTracker

STEPS = 8
TRACKER = "latest_checkpointed_iteration.txt"


def config(
    folder: Path, name: str, dataset: str, parallel: dict | None = None, **train
) -> list[str]:
    settings = {"steps": STEPS, "save_interval": None, **train}
    sections = {"parallel": parallel or {}, "train": settings}
    path = write_config(folder / f"{name}.yaml", dataset, folder / name, **sections)
    return ["train", "--config", path]


def send_at_step(monkeypatch, step: int, *signals: int) -> None:
    """Send this process the signals when the line of `step` is written."""
    log = JsonlTracker.log

    def logging(self, done: int, values: dict) -> None:
        log(self, done, values)
        if done == step and "loss" in values:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # so that its handler runs

    monkeypatch.setattr(JsonlTracker, "log", logging)


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("straight")
    assert main(config(folder, "straight", dataset)) == 0
    return lines(folder / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_and_the_run_can_be_resumed(
    dataset, tmp_path, capsys, monkeypatch, expected, number
):
    argv = config(tmp_path, "run", dataset)
    with monkeypatch.context() as patched:
        send_at_step(patched, 3, number)
        code, message = command(argv, capsys)
    assert code == 143
    assert f"stopped by a signal after step 3 (saved in {tmp_path / 'run' / 'saved'})" in message
    assert "Traceback" not in message
    assert lines(tmp_path / "run") == expected[:3]
    next_line = message.strip().splitlines()[-1]
    assert next_line == f"next: megatron-prefix train --config {tmp_path / 'run'}/config.yaml"
    assert (tmp_path / "run" / "saved" / TRACKER).read_text() == "3"
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert command(shlex.split(next_line)[2:], capsys)[0] == 0
    assert lines(tmp_path / "run") == expected


def test_a_signal_in_the_last_step_changes_nothing(
    dataset, tmp_path, capsys, monkeypatch, expected
):
    send_at_step(monkeypatch, STEPS, signal.SIGTERM)
    assert command(config(tmp_path, "run", dataset), capsys)[0] == 0
    assert lines(tmp_path / "run") == expected


def test_without_train_save_it_says_that_nothing_is_kept(dataset, tmp_path, capsys, monkeypatch):
    send_at_step(monkeypatch, 2, signal.SIGTERM)
    code, message = command(config(tmp_path, "run", dataset, save=None, load=None), capsys)
    assert code == 143 and "after step 2 (train.save is not set)" in message


def _twice(argv: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patched:
        send_at_step(patched, 3, signal.SIGTERM, signal.SIGTERM)
        return main(argv)


def test_a_second_signal_ends_the_run_at_once(dataset, tmp_path, expected):
    argv = config(tmp_path, "run", dataset)

    assert forked(partial(_twice, argv), tmp_path / "log") == -signal.SIGTERM
    assert not (tmp_path / "run" / "saved" / TRACKER).exists()
    assert lines(tmp_path / "run") == expected[:3]


@pytest.mark.parametrize(
    "layout, torchrun",
    [
        ({}, False),
        pytest.param({}, True, marks=pytest.mark.slow),
        pytest.param({"tensor_model_parallel_size": 2}, True, marks=pytest.mark.slow),
        pytest.param({"pipeline_model_parallel_size": 2}, True, marks=pytest.mark.slow),
    ],
    ids=["dp2", "dp2 torchrun", "tp2", "pp2"],
)
def test_a_signal_to_one_process_stops_all(dataset, tmp_path, capsys, layout, torchrun):
    """The run then continues on one process and ends like an uninterrupted one."""
    steps = {"steps": 400, "save_interval": 20}
    argv = config(tmp_path, "run", dataset, layout, **steps)
    if torchrun:
        run = launch(argv, tmp_path / "log")
    else:
        run = start_ranks(2, partial(main, argv), tmp_path)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT_S
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert run.is_running(), run.text()
        time.sleep(0.01)
    os.kill(run.ranks()[-1], signal.SIGTERM)
    if torchrun:
        assert run.wait() != 0 and "exitcode  : 143" in run.text() and not run.pids()
    else:
        assert run.wait(TIMEOUT_S) == [143, 143], run.text()
    assert "megatron_prefix/train" not in run.text(), "a traceback of ours"
    stopped = int((tmp_path / "run" / "saved" / TRACKER).read_text())
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, stopped + 1))
    assert 0 < stopped < 400
    steps["steps"] = stopped + 4
    assert command(config(tmp_path, "run", dataset, **steps), capsys)[0] == 0
    assert command(config(tmp_path, "straight", dataset, **steps), capsys)[0] == 0
    history, expected = lines(tmp_path / "run"), lines(tmp_path / "straight")
    assert [row["step"] for row in history] == [row["step"] for row in expected]
    for ours, theirs in zip(history, expected, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-4 * max(theirs["loss"], 1e-2)
