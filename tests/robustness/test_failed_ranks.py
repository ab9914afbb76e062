"""A rank that crashes, hangs or fails alone ends the other one, and the message names it.

Two processes run the program; the fault happens to one of them in its third step. No line that they
print comes from a traceback of the program. torchrun, which most tests use, prints its own text
after theirs.
"""

from __future__ import annotations

import runpy
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import Launched, launch, write_config
from processes import Ranks, start_ranks

from megatron_prefix.distributed.liveness import MARGIN_S

LIMIT_S = 100
FAULTY = """
import os, signal, sys, time
from megatron_prefix.__main__ import main
from megatron_prefix.errors import InputError
from megatron_prefix.reference import scoring as reference
from megatron_prefix.trackers.jsonl import JsonlTracker
from megatron_prefix.train.trainer import Trainer

fault = sys.argv.pop(1)
gradients, add_scores, write = Trainer._gradients, reference._add_scores, JsonlTracker._write

def fail():
    if fault in ("SIGKILL", "SIGSTOP", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "host":
        os._exit(3)
    elif fault == "sleep":
        time.sleep(600)
    elif fault == "input":
        raise InputError("data.train: unreadable here")
    elif fault == "defect":
        raise KeyError("a defect")

def stepping(self, *given):
    if self.step == 2:
        fail()
    return gradients(self, *given)

def scoring(chunks, dataset, step, *others):
    if step.plan.step == 2:
        fail()
    return add_scores(chunks, dataset, step, *others)

def writing(self, line):
    if fault == "disk" and line.startswith('{"step": 3'):
        raise OSError(28, "No space left on device")
    if fault == "nan" and line.startswith('{"step": 1'):
        raise AssertionError("step 1 was meant to be not finite")
    write(self, line)

def poisoned(self, *given):
    logs = gradients(self, *given)
    logs[0]["loss"].fill_(float("nan"))
    return logs

JsonlTracker._write = writing
if fault == "host":  # rank 0 then has the store
    port = str(int(os.environ["MASTER_PORT"]) + 1)
    os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")
if os.environ["RANK"] == ("0" if fault == "host" else "1"):
    Trainer._gradients, reference._add_scores = stepping, scoring
if fault == "nan":
    Trainer._gradients = poisoned
sys.exit(main())
"""
"""The program, with a fault on rank 1; those of `disk` and `host` are on rank 0, `nan` on both."""


def arguments(
    folder: Path, dataset: str, fault: str, command: str = "train", **sections
) -> list[str]:
    """The script of FAULTY and its arguments."""
    sections.setdefault("train", {"save": None, "load": None, "save_interval": None})
    config = write_config(folder / "run.yaml", dataset, folder / "run", **sections)
    script = folder / "faulty.py"
    script.write_text(FAULTY)
    output = ["--output", str(folder / "ref")] if command == "score" else []
    return [str(script), fault, command, "--config", config, *output]


def start(folder: Path, *args, **sections) -> Launched:
    """By torchrun."""
    script, *argv = arguments(folder, *args, **sections)
    return launch(argv, folder / "log", (script,))


def faulty(argv: list[str]) -> None:
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def forked(folder: Path, *args, **sections) -> Ranks:
    """Without torchrun, which neither waits for the ranks then, nor ends them."""
    return start_ranks(2, partial(faulty, arguments(folder, *args, **sections)), folder)


def log_of(run: Launched) -> str:
    """What the run printed until torchrun ended; no process of it is left then."""
    deadline = time.monotonic() + LIMIT_S
    while run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    text = run.log.read_text()
    if run.process.poll() is None:
        run.kill()
        raise AssertionError(f"no end in {LIMIT_S} s: {text[-2000:]}")
    assert run.process.returncode == 1 and not run.pids()
    return text


def only_message(text: str) -> str:
    """The one message of the program, which printed no traceback."""
    assert "megatron_prefix/train" not in text, text[-4000:]
    lines = [x for x in text.splitlines() if x.startswith("megatron-prefix")]
    assert len(lines) == 1, lines
    (line,) = lines
    return line


def test_a_killed_rank_is_named(dataset, tmp_path):
    message = only_message(log_of(start(tmp_path, dataset, "SIGKILL")))
    assert message.startswith("megatron-prefix train: error: rank 1 ended or hangs (no answer; ")
    assert "last in step 3" in message


def test_a_stopped_rank_is_named_within_the_timeout(dataset, tmp_path):
    timeout_s = 9
    parallel = {"distributed_timeout_minutes": timeout_s / 60}
    run = forked(tmp_path, dataset, "SIGSTOP", parallel=parallel)
    stopped, deadline = None, time.monotonic() + LIMIT_S
    while "error: " not in run.text() and time.monotonic() < deadline:
        time.sleep(0.1)
        if stopped is None and _state(run.ranks()[1]) == "T":
            stopped = time.monotonic()
    end = time.monotonic()
    run.processes[1].kill()  # a stopped process takes no other signal
    assert run.wait(LIMIT_S) == [1, -signal.SIGKILL]
    message = only_message(run.text())
    assert "no progress for 0.15 minutes (parallel.distributed_timeout_minutes)" in message
    assert "rank 1 ended or hangs (no answer; last in step 3)" in message
    assert "rank 0" not in message
    assert timeout_s - 2 < end - stopped < timeout_s + MARGIN_S, "the process groups' own timeout"


def _state(pid: int) -> str:
    """Of /proc: T is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def test_an_error_of_one_rank_alone_is_printed_once(dataset, tmp_path):
    run = forked(tmp_path, dataset, "input")
    assert run.wait(LIMIT_S) == [1, 2], run.text()
    assert only_message(run.text()) == (
        "megatron-prefix train: error: rank 1: data.train: unreadable here"
    )


@pytest.mark.slow
def test_a_wrong_number_of_processes_stops_all_with_both_numbers(dataset, tmp_path):
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    text = log_of(start(tmp_path, dataset, "none", parallel=sizes))
    message = only_message(text)
    assert "2 processes were started" in message and "a multiple of 4" in message
    assert "exitcode  : 1" not in text and "exitcode  : 2" in text


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_own_code_is_named_with_the_place(dataset, tmp_path):
    parallel = {"distributed_timeout_minutes": 0.2}
    message = only_message(log_of(start(tmp_path, dataset, "sleep", parallel=parallel)))
    assert "rank 1 hangs in step 3 at " in message and "faulty.py:" in message
    assert "rank 0" not in message


@pytest.mark.slow
def test_a_defect_on_one_rank_shows_its_traceback_and_is_named(dataset, tmp_path):
    """The rank's own message, with the file of its traceback, and the one of all ranks."""
    text = log_of(start(tmp_path, dataset, "defect"))
    messages = [x for x in text.splitlines() if x.startswith("megatron-prefix")]
    assert any("rank 1 failed in step 3: KeyError: 'a defect'" in x for x in messages), messages
    (own,) = (x for x in messages if "error: rank 1: KeyError: 'a defect'" in x)
    assert "a defect" in Path(own.split("which is in ")[1]).read_text(encoding="utf-8")
    assert "[rank0]:" not in text


@pytest.mark.slow
def test_metrics_that_cannot_be_written_stop_both_ranks(dataset, tmp_path):
    message = only_message(log_of(start(tmp_path, dataset, "disk")))
    assert message.startswith("megatron-prefix train: error: logging.output = ")
    assert "the metrics of step 3 could not be written" in message


@pytest.mark.slow
@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_a_rank_killed_in_scoring_is_named(dataset, tmp_path, command):
    run = start(tmp_path, dataset, "SIGKILL", command, data={"valid": dataset})
    message = only_message(log_of(run))
    assert message.startswith(f"megatron-prefix {command}: error: rank 1 ended or hangs (")
    assert "last in scoring, step 3 of 4" in message


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_scoring_on_both(dataset, tmp_path):
    text = log_of(start(tmp_path, dataset, "SIGTERM", "score"))
    assert only_message(text).endswith("error: ended by SIGTERM")
    assert text.count("exitcode  : 143") == 2


@pytest.mark.slow
def test_a_store_that_ended_is_reported(dataset, tmp_path):
    message = only_message(log_of(start(tmp_path, dataset, "host")))
    assert "the process groups' store does not answer: rank 0, or its launcher, has" in message
    assert "(step 3)" in message


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_stages(dataset, tmp_path):
    sizes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    text = log_of(start(tmp_path, dataset, "nan", parallel=sizes, model={"num_layers": 4}))
    assert "the loss of step 1 is not finite: rank 0 row 0 (groups " in only_message(text)
    assert (tmp_path / "run" / "nonfinite-step0000001-rank0.npz").exists()
    assert text.count("exitcode  : 1") == 2
