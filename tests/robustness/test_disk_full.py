"""A full disk: one message, exit code 1, and everything earlier is as it was.

A limit on the size of files (RLIMIT_FSIZE) replaces a full disk. It is set in this process just
below the size of what is written, and removed afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import SIZES, command, launch, lines, write_config

from megatron_prefix.__main__ import main
from megatron_prefix.checkpoint import RunCheckpoints

BIG = {**SIZES, "hidden_size": 64, "ffn_hidden_size": 256}
"""A model whose checkpoint has larger files than everything else that a run writes."""
LIMITS = {"tensors": 1 << 17, "common.pt": 2000, "first file": 16}


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Every write beyond `num_bytes` of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def config(folder: Path, dataset: str, **train) -> list[str]:
    path = write_config(
        folder / "run.yaml", dataset, folder / "run", model=BIG, train={"steps": 4, **train}
    )
    return ["train", "--config", path]


def limited_from(monkeypatch, step: int, num_bytes: int) -> None:
    """Set the limit around the save of `step`."""
    save = RunCheckpoints.save

    def saving(self, number, *args, **kwargs):
        with files_up_to(num_bytes) if number == step else contextlib.nullcontext():
            save(self, number, *args, **kwargs)

    monkeypatch.setattr(RunCheckpoints, "save", saving)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_save_leaves_the_previous_checkpoint(dataset, tmp_path, capsys, monkeypatch, limit):
    argv = config(tmp_path, dataset)
    assert command(argv, capsys)[0] == 0
    expected = lines(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "straight")
    saved = tmp_path / "run" / "saved"
    with monkeypatch.context() as patched:
        limited_from(patched, 3, LIMITS[limit])
        code, message = command(argv, capsys)
    assert code == 1 and "Traceback" not in message
    assert f"train.save = {saved}: the checkpoint of step 3 could not be written" in message
    assert "earlier checkpoints are unchanged" in message
    assert sorted(p.name for p in saved.iterdir()) == [
        *("iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt")
    ]
    assert command(argv, capsys)[0] == 0
    assert lines(tmp_path / "run") == expected


def test_a_full_disk_for_metrics(dataset, tmp_path, capsys):
    """The lines grow until one does not fit; what it tears is cut off by the next run."""
    argv = config(tmp_path, dataset, save_interval=None, steps=40)
    with files_up_to(6000):
        code, message = command([*argv, "train.save=null", "train.load=null"], capsys)
    assert code == 1 and "Traceback" not in message
    assert f"logging.output = {tmp_path / 'run'}: the metrics of step" in message


def test_a_full_disk_for_tensorboard(dataset, tmp_path, capfd):
    """One message, and no traceback of a thread: event files grow faster than metrics."""
    pytest.importorskip("tensorboard")
    path = write_config(
        tmp_path / "run.yaml",
        dataset,
        tmp_path / "run",
        train={"steps": 40, "save": None, "load": None, "save_interval": None},
        logging={"tensorboard": True},
    )
    with files_up_to(6000):
        assert main(["train", "--config", path]) == 1
    printed = capfd.readouterr()
    (message,) = printed.err.splitlines()
    assert f"logging.output = {tmp_path / 'run'}: the metrics of step" in message
    assert "Traceback" not in printed.out and lines(tmp_path / "run")


@pytest.fixture
def records(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [
        {"prompt": "Say it. " * 20, "chosen": f"{i} yes", "rejected": f"{i} no"} for i in range(50)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("num_bytes", [10, 2000, 8000])
def test_build_leaves_nothing_on_disk(records, tmp_path, capsys, num_bytes):
    """Output that cannot be written is wrong input for `build`, which has nothing to keep."""
    output = tmp_path / "made" / "set"
    argv = ["build", "--input", str(records), "--tokenizer", "bytes", "--output", str(output)]
    with files_up_to(num_bytes):
        code, message = command(argv, capsys)
    assert code == 2 and "Traceback" not in message
    assert f"output {output} cannot be written" in message and "File too large" in message
    assert not output.parent.exists()
    assert command(argv, capsys)[0] == 0


@pytest.mark.parametrize("num_bytes", [10, 500])
def test_score_continues_when_there_is_room(dataset, tmp_path, capsys, num_bytes):
    output = tmp_path / "ref"
    path = write_config(tmp_path / "c.yaml", dataset, tmp_path / "run")
    argv = ["score", "--config", path, "--output", str(output)]
    with files_up_to(num_bytes):
        code, message = command(argv, capsys)
    assert code == 1 and "Traceback" not in message
    assert f"--output {output}: cannot be written" in message
    assert not output.exists() and not list(tmp_path.rglob("*.tmp"))
    assert command(argv, capsys)[0] == 0
    assert main([*argv[:-1], str(tmp_path / "straight")]) == 0
    assert output.read_bytes() == (tmp_path / "straight").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["tensors", "common.pt"])
def test_two_processes_stop_together(dataset, tmp_path, limit):
    """No process waits for one that has failed, and one of them prints the message."""
    argv = config(tmp_path, dataset, steps=2)
    with files_up_to(max(LIMITS[limit], 4000)):  # torchrun's own lines are in the log, too
        run = launch(argv, tmp_path / "log")
        assert run.wait() == 1
    log = run.log.read_text()
    assert not run.pids()
    assert log.count("the checkpoint of step 1 could not be written") == 1, log
    assert "megatron_prefix/train" not in log, "a traceback of ours"
    assert not list((tmp_path / "run" / "saved").iterdir())
