"""`train.async_save`: the same run and checkpoints, and nothing is lost however a run ends.

A slow disk is a pause within the write of a checkpoint, of the test's own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import SIZES, TIMEOUT_S, command, forked, lines, write_config
from megatron.core import dist_checkpointing
from processes import start_ranks
from test_disk_full import BIG, LIMITS

from megatron_prefix.__main__ import main
from megatron_prefix.checkpoint import save_load
from megatron_prefix.checkpoint import writing as writing_module
from megatron_prefix.checkpoint.folder import complete_steps, iteration_dir
from megatron_prefix.checkpoint.writing import Snapshot
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed import join_world

ZERO = {"use_distributed_optimizer": True}
PAUSE_S = 0.3


def config(folder: Path, dataset: str, name: str, parallel=None, model=SIZES, **train) -> list[str]:
    """The command of a run that saves in the background after every step."""
    path = write_config(
        folder / f"{name}.yaml",
        dataset,
        folder / name,
        model=model,
        parallel=parallel or {},
        data={"valid": dataset},
        train={"steps": 4, "async_save": True, "eval_interval": 1, **train},
    )
    return ["train", "--config", path]


def saved(folder: Path, name: str, step: int) -> tuple[dict, dict]:
    """Tensors of a checkpoint, and what is saved beside them."""
    path = str(iteration_dir(folder / name / "saved", step))
    with join_world(ParallelConfig(), seed=0):
        tensors = dist_checkpointing.load_plain_tensors(path)
        common = dist_checkpointing.load_common_state_dict(path)
    return tensors, common


def assert_same_checkpoints(folder: Path, name: str, expected: str, steps: list[int]) -> None:
    roots = [folder / run / "saved" for run in (name, expected)]
    assert complete_steps(roots[0]) == complete_steps(roots[1]) == steps
    assert len({(root / save_load.TRACKER).read_text() for root in roots}) == 1
    for step in steps:
        (tensors, common), (others, other_common) = (
            saved(folder, x, step) for x in (name, expected)
        )
        assert tensors.keys() == others.keys() and len(tensors) > 20
        for key, tensor in others.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensors[key], tensor), (step, key)
        assert str(common) == str(other_common)
        files = [
            sorted(str(p.relative_to(root)) for p in iteration_dir(root, step).rglob("*"))
            for root in roots
        ]
        assert files[0] == files[1]


@contextlib.contextmanager
def slow_disk(monkeypatch, seconds: float = PAUSE_S):
    """Every save pauses before its files are written."""
    write = Snapshot.write

    def writing(self, *args):
        time.sleep(seconds)
        write(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "write", writing)
        yield


def test_the_run_is_the_same(dataset, tmp_path, capsys, monkeypatch):
    """Metrics, tensors bit for bit, files, what is kept; on a disk that is slower than a step."""
    keeping = {"keep_last": 2, "keep_best": {"metric": "eval_loss", "mode": "max"}}
    plain = config(tmp_path, dataset, "plain", async_save=False, **keeping)
    assert command(plain, capsys)[0] == 0
    with slow_disk(monkeypatch):
        assert command(config(tmp_path, dataset, "background", **keeping), capsys)[0] == 0
    assert lines(tmp_path / "background") == lines(tmp_path / "plain")
    best = [
        json.loads((tmp_path / run / "saved" / "best_checkpoint.json").read_text())
        for run in ("background", "plain")
    ]
    assert best[0] == best[1]
    steps = sorted({best[0]["step"], 3, 4})
    assert_same_checkpoints(tmp_path, "background", "plain", steps)
    assert not list((tmp_path / "background" / "saved").glob(".*"))
    assert not (tmp_path / "background" / "saved" / "run.lock").exists()


def test_training_does_not_wait_for_the_disk(dataset, tmp_path, capsys, monkeypatch):
    """All steps are done before the first of two saves is written; then the second one waits."""
    moments, gate = [], threading.Event()
    write = Snapshot.write

    def writing(self, *args):
        assert threading.current_thread() is not threading.main_thread()
        if not moments:
            gate.wait(30)
        moments.append(len(lines(tmp_path / "run")))
        write(self, *args)

    monkeypatch.setattr(Snapshot, "write", writing)
    wait_before = save_load.BackgroundSave.wait_before

    def waiting(self, step):
        if step == 4:
            threading.Timer(0.2, gate.set).start()
        wait_before(self, step)

    monkeypatch.setattr(save_load.BackgroundSave, "wait_before", waiting)
    argv = config(tmp_path, dataset, "run", save_interval=2, eval_interval=None)
    assert main([*argv, "data.valid=null"]) == 0
    printed = capsys.readouterr().out
    assert moments[0] == 4, "steps 3 and 4 waited for the save of step 2"
    assert printed.count("train.async_save: the save of step 4 waited") == 1
    assert complete_steps(tmp_path / "run" / "saved") == [2, 4]


@contextlib.contextmanager
def full_disk(num_bytes: int):
    """As `files_up_to`, on a thread; Python ignores the signal by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["make_room", "tensors", "save_config", "publish"])
def test_a_full_disk_ends_the_run(dataset, tmp_path, capsys, monkeypatch, place):
    """The same message and exit code as without async_save, at the next step."""
    write, saves = Snapshot.write, []
    argv = config(tmp_path, dataset, "run", model=BIG, steps=100, save_interval=3)
    with monkeypatch.context() as patched:

        def writing(self, *args):
            saves.append(args)
            with full_disk(LIMITS[place]) if len(saves) == 2 else contextlib.nullcontext():
                write(self, *args)

        if place == "tensors":
            patched.setattr(Snapshot, "write", writing)
        else:
            owner = writing_module if place == "save_config" else save_load
            action = getattr(owner, place)

            def failing(*args):
                saves.append(args)
                return (no_space if len(saves) == 2 else action)(*args)

            patched.setattr(owner, place, failing)
        code, message = command(argv, capsys)
    assert code == 1 and "Traceback" not in message and message.count("error:") == 1
    root = tmp_path / "run" / "saved"
    assert f"train.save = {root}: the checkpoint of step 6 could not be written" in message
    assert "earlier checkpoints are unchanged" in message
    assert lines(tmp_path / "run")[-1]["step"] < 12, "the run went on"
    assert sorted(p.name for p in root.iterdir()) == [
        *("iter_0000003", "latest_checkpointed_iteration.txt")
    ]
    assert command([*argv, "train.steps=7"], capsys)[0] == 0
    assert complete_steps(root) == [3, 6, 7]


def test_a_run_whose_last_save_fails_has_failed(dataset, tmp_path, capsys, monkeypatch):
    """The save is in flight when the last step is done, and the run is not over before it."""

    def failing(*args):
        time.sleep(PAUSE_S)
        no_space()

    monkeypatch.setattr(save_load, "publish", failing)
    code, message = command(config(tmp_path, dataset, "run", steps=1), capsys)
    assert code == 1 and "the checkpoint of step 1 could not be written" in message
    assert message.count("error:") == 1


STAGES = [
    ("megatron_prefix.checkpoint.save_load", "make_room"),
    ("megatron_prefix.checkpoint.writing", "save_config"),
    ("megatron_prefix.checkpoint.save_load", "write_checksums"),
    ("megatron_prefix.checkpoint.save_load", "flush_tree"),
    ("megatron_prefix.checkpoint.save_load", "publish"),
]


QUICK = ("write_checksums", "publish")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(*stage, id=stage[1], marks=() if stage[1] in QUICK else pytest.mark.slow)
        for stage in STAGES
    ],
)
def test_a_kill_within_the_write_leaves_the_previous_checkpoint(
    dataset, tmp_path, capsys, module, name
):
    """SIGKILL after each stage of the second save, while training has gone on."""
    argv = config(tmp_path, dataset, "run")
    assert forked(partial(_killed_in, argv, module, name), tmp_path / "log") == -signal.SIGKILL
    root = tmp_path / "run" / "saved"
    newest = (root / save_load.TRACKER).read_text()
    assert newest == ("2" if name == "publish" else "1")
    assert command(argv, capsys)[0] == 0
    assert command(config(tmp_path, dataset, "straight"), capsys)[0] == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")
    assert_same_checkpoints(tmp_path, "run", "straight", [1, 2, 3, 4])
    assert not list(root.glob(".iter*"))


def _killed_in(argv: list[str], module: str, name: str) -> int:
    """Train, and die in the second save, after module.name, when step 3 is done."""
    import importlib

    owner = importlib.import_module(module)
    begin, saves = save_load.make_room, []
    action = getattr(owner, name)

    def beginning(partial: Path) -> None:
        saves.append(partial)
        begin(partial)
        if name == "make_room":
            dying_now()

    def dying_now() -> None:
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(*args):
        result = action(*args)
        dying_now()
        return result

    save_load.make_room = beginning
    if name != "make_room":
        setattr(owner, name, dying)
    return main(argv)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_waits_for_the_save(dataset, tmp_path, capsys, number):
    """The state of the last step is saved, whole, before the process ends."""
    argv = config(tmp_path, dataset, "run", steps=1000)
    assert forked(partial(_signalled, argv, number), tmp_path / "log") == 143
    root = tmp_path / "run" / "saved"
    (newest,) = complete_steps(root)[-1:]
    assert (root / save_load.TRACKER).read_text() == str(newest)
    rows = [row for row in lines(tmp_path / "run") if "loss" in row]
    assert rows[-1]["step"] == newest
    assert (
        f"stopped by a signal after step {newest} (saved in {root})"
        in (tmp_path / "log").read_text()
    )
    assert not list(root.glob(".iter*"))
    assert command([*argv, f"train.steps={newest + 1}"], capsys)[0] == 0


def _signalled(argv: list[str], number: int) -> int:
    """Train with slow writes; the third save begins with a signal."""
    begin, write, saves = save_load.make_room, Snapshot.write, []

    def beginning(partial: Path) -> None:
        saves.append(partial)
        begin(partial)
        if len(saves) == 3:
            os.kill(os.getpid(), number)

    def writing(self, *args):
        time.sleep(PAUSE_S)
        write(self, *args)

    save_load.make_room, Snapshot.write = beginning, writing
    return main(argv)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_sigterm_ends_at_once(dataset, tmp_path, capsys, count):
    """Nothing of the save in flight becomes a checkpoint, and the one before is whole."""
    argv = config(tmp_path, dataset, "run", steps=1000, save_interval=3)
    start = time.monotonic()
    action = partial(_terminated_twice, argv)
    if count == 1:
        assert forked(action, tmp_path / "log") == -signal.SIGTERM
    else:
        ranks = start_ranks(2, action, tmp_path)
        codes = ranks.wait(TIMEOUT_S)
        # rank 0 has the store here, and may be gone before rank 1 asks who failed
        assert codes[0] == 143 and codes[1] in (1, 143), ranks.text()[-3000:]
        assert "ended by SIGTERM" in ranks.text() and "Traceback" not in ranks.text()
    assert time.monotonic() - start < 90
    root = tmp_path / "run" / "saved"
    assert complete_steps(root) == [3]
    assert command([*argv, "train.steps=4"], capsys)[0] == 0
    assert complete_steps(root) == [3, 4] and not list(root.glob(".iter*"))


def _terminated_twice(argv: list[str]) -> int:
    """Train; the write of the second save takes 100 s, in which SIGTERM comes twice."""
    write, saves = Snapshot.write, []

    def writing(self, *args):
        saves.append(args)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        write(self, *args)

    Snapshot.write = writing
    return main(argv)


def test_an_error_of_training_waits_for_the_save(dataset, tmp_path, capsys, monkeypatch):
    from megatron_prefix.train.trainer import Trainer

    step = Trainer.train_step

    def failing(self):
        if self.step == 2:
            raise RuntimeError("planted")
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", failing)
    with slow_disk(monkeypatch):
        code, message = command(config(tmp_path, dataset, "run"), capsys)
    assert code == 1 and "planted" in message
    assert complete_steps(tmp_path / "run" / "saved") == [1, 2]


def test_two_processes_with_the_distributed_optimizer(dataset, tmp_path):
    """The same lines and checkpoints; killed within a save, it goes on from the one before."""
    runs = {
        "plain": config(tmp_path, dataset, "plain", ZERO, async_save=False),
        "background": config(tmp_path, dataset, "background", ZERO),
    }
    for name, argv in runs.items():
        ranks = start_ranks(2, partial(main, argv), tmp_path)
        assert ranks.wait(TIMEOUT_S) == [0, 0], ranks.text()[-3000:]
        assert (name == "plain") or "Traceback" not in ranks.text()
    assert lines(tmp_path / "background") == lines(tmp_path / "plain")
    assert_same_checkpoints(tmp_path, "background", "plain", [1, 2, 3, 4])
    argv = config(tmp_path, dataset, "killed", ZERO)
    ranks = start_ranks(
        2, partial(_killed_in, argv, "megatron_prefix.checkpoint.save_load", "flush_tree"), tmp_path
    )
    codes = ranks.wait(TIMEOUT_S)
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, None), ranks.text()[-3000:]
    assert "has ended" in ranks.text() or "ended or hangs" in ranks.text()
    assert (tmp_path / "killed" / "saved" / save_load.TRACKER).read_text() == "1"
    ranks = start_ranks(2, partial(main, argv), tmp_path)
    assert ranks.wait(TIMEOUT_S) == [0, 0], ranks.text()[-3000:]
    assert "resumed from" in ranks.text()
    assert lines(tmp_path / "killed") == lines(tmp_path / "plain")
    assert_same_checkpoints(tmp_path, "killed", "plain", [1, 2, 3, 4])


def test_two_processes_stop_together(dataset, tmp_path):
    """One rank cannot do its part: one message, and both end."""
    argv = config(tmp_path, dataset, "run", ZERO, steps=1000, save_interval=2)
    ranks = start_ranks(2, partial(_full_on_rank_1, argv), tmp_path)
    assert ranks.wait(TIMEOUT_S) == [1, 1], ranks.text()[-3000:]
    text = ranks.text()
    assert text.count("the checkpoint of step 2 could not be written") == 1, text[-3000:]
    assert "Traceback" not in text
    assert complete_steps(tmp_path / "run" / "saved") == []
    assert lines(tmp_path / "run")[-1]["step"] < 8


@pytest.mark.slow
def test_a_stalled_write_is_named_and_its_rank_alone(dataset, tmp_path):
    """Both ranks make no progress; the one that writes is named with the write, and no other."""
    parallel = {**ZERO, "distributed_timeout_minutes": 3 / 60}
    argv = config(tmp_path, dataset, "run", parallel, steps=2, save_interval=1)
    ranks = start_ranks(2, partial(_stalled_on_rank_1, argv), tmp_path)
    assert ranks.wait(TIMEOUT_S) == [1, 1], ranks.text()[-3000:]
    # rank 0 has the store here, and may be gone before rank 1 ends
    (line,) = [x for x in ranks.text().splitlines() if "error: no progress" in x]
    assert "no progress for 0.05 minutes (parallel.distributed_timeout_minutes): rank 1 " in line
    assert "(the background write of the checkpoint of step 1, since " in line
    assert "test_async_save.py:" in line and "rank 0" not in line


def _stalled_on_rank_1(argv: list[str]) -> int:
    if os.environ["RANK"] == "1":
        writing_module.sha256 = lambda path: time.sleep(600)
    return main(argv)


def _full_on_rank_1(argv: list[str]) -> int:
    """Rank 1 cannot read what it computes checksums of; rank 0 could go on."""
    if os.environ["RANK"] == "1":
        writing_module.sha256 = no_space
    return main(argv)
