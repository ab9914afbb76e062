"""A save in the background: what training waits for, and how its errors and its end reach it."""

from __future__ import annotations

import functools
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import filesystem

from megatron_prefix.checkpoint import RunCheckpoints, save_load
from megatron_prefix.checkpoint import background as module
from megatron_prefix.checkpoint.background import BackgroundSave, GivenUp
from megatron_prefix.checkpoint.folder import TRACKER, complete_steps, iteration_dir
from megatron_prefix.checkpoint.keeping import Keeping
from megatron_prefix.checkpoint.torch_dist import COMPLETE
from megatron_prefix.checkpoint.writing import Snapshot
from megatron_prefix.errors import RunError
from megatron_prefix.platform import side_works

pytestmark = pytest.mark.usefixtures("world")


def failing(group) -> None:
    raise RunError("the disk is full")


def test_nothing_in_flight_is_nothing_to_wait_for(capsys):
    save = BackgroundSave()
    save.check()
    save.wait()
    save.wait_before(3)
    save.leave()
    assert capsys.readouterr() == ("", "")


def test_training_goes_on_until_the_files_are_there():
    save, gate, written = BackgroundSave(), threading.Event(), []
    save.start(1, lambda group: written.append(gate.wait(30)))
    save.check()
    assert not written, "`start` or `check` waited"
    gate.set()
    save.wait()
    assert written == [True]
    save.start(2, lambda group: written.append(2))
    save.wait()
    assert written == [True, 2]


def test_the_threads_have_a_group_of_their_own():
    save, groups = BackgroundSave(), []
    for step in (1, 2):
        save.start(step, groups.append)
        save.wait()
    assert groups[0] is groups[1]
    assert groups[0] not in (None, dist.group.WORLD)


@pytest.mark.parametrize("end", ["check", "wait", "wait_before"])
def test_an_error_is_raised_once(end):
    save = BackgroundSave()
    save.start(1, failing)
    save._thread.join()
    with pytest.raises(RunError, match="the disk is full"):
        getattr(save, end)(*[2] * (end == "wait_before"))
    save.check()
    save.start(2, lambda group: None)
    save.wait()


def test_leaving_waits_and_prints_the_failure(capsys):
    save, written = BackgroundSave(), []
    save.start(1, lambda group: (time.sleep(0.1), written.append(1)))
    save.leave()
    assert written == [1] and capsys.readouterr().err == ""
    save.start(2, failing)
    save.leave()
    assert capsys.readouterr().err == "the disk is full\n"


def test_waiting_is_said_once(capsys):
    save = BackgroundSave()
    for step in (1, 2, 3):
        save.wait_before(step)
        save.start(step, lambda group: time.sleep(0.2))
    save.wait()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("train.async_save: the save of step 2 waited 0.")
    assert "raise train.save_interval" in line
    quick = BackgroundSave()
    for step in (1, 2):
        quick.wait_before(step)
        quick.start(step, lambda group: None)
        quick._thread.join()
    assert capsys.readouterr().out == ""


def test_what_is_given_up_is_not_published():
    save, gate, published = BackgroundSave(), threading.Event(), []

    def write(group) -> None:
        gate.wait(30)
        with save.publishing():
            published.append(1)

    save.start(1, write)
    save.give_up()
    gate.set()
    save._thread.join()
    assert not published and isinstance(save._error, GivenUp)


def test_giving_up_waits_for_what_is_being_published():
    save, is_publishing, order = BackgroundSave(), threading.Event(), []

    def write(group) -> None:
        with save.publishing():
            is_publishing.set()
            time.sleep(0.2)
            order.append("published")

    save.start(1, write)
    assert is_publishing.wait(30)
    save.give_up()
    order.append("given up")
    assert order == ["published", "given up"]


def test_giving_up_does_not_wait_for_the_removal_of_old_checkpoints(tmp_path, monkeypatch):
    """It may take minutes. The newest checkpoint is whole, and the next start removes the rest."""
    root, gate, is_removing = tmp_path / "saved", threading.Event(), threading.Event()
    for step in (1, 2, 3):
        iteration_dir(root, step).mkdir(parents=True)
        (iteration_dir(root, step) / COMPLETE).write_text("{}")
    (root / TRACKER).write_text("2")

    def removing(folder, **_) -> None:
        is_removing.set()
        gate.wait(30)

    monkeypatch.setattr(save_load.shutil, "rmtree", removing)
    save = BackgroundSave()
    checkpoints = RunCheckpoints(root, Keeping(last=1), save)
    snapshot = SimpleNamespace(write=lambda path, *_: (path / COMPLETE).write_text("{}"))
    partial = root / ".iter_0000003.partial-0"
    write = functools.partial(checkpoints._write, 3, snapshot, partial, lambda path: None, None)
    save.start(3, write)
    assert is_removing.wait(30)
    start = time.monotonic()
    save.give_up()
    assert time.monotonic() - start < 10 and not gate.is_set()
    assert checkpoints.latest_step() == 3
    gate.set()
    save._thread.join()
    monkeypatch.undo()
    left = [path.name for path in root.glob(".iter_*.partial-*")]
    assert left and not partial.exists(), "the replaced one of step 3"
    RunCheckpoints(root).claim(str(root))
    assert not [*root.glob(".*")] and complete_steps(root)[-1] == 3


def test_what_training_waits_for_has_a_name():
    """A hang report names it, see distributed/verdict.py."""
    save, gate, seen = BackgroundSave(), threading.Event(), []
    save.start(4, lambda group: gate.wait(30))
    (work,) = side_works()
    assert work.described.startswith("the background write of the checkpoint of step 4, since ")
    assert not work.is_awaited

    def look() -> None:
        while not work.is_awaited:
            time.sleep(0.001)
        seen.append(True)
        gate.set()

    for end in (save.wait, save.leave):
        looking = threading.Thread(target=look)
        looking.start()
        end()
        looking.join(30)
        assert not work.is_awaited
        gate.clear()
        if len(seen) < 2:
            save.start(5, lambda group: gate.wait(30))
            (work,) = side_works()
    assert len(seen) == 2


def test_a_failure_of_another_process_is_one(monkeypatch):
    """Its collective says so; this process's own thread is not waited for without end."""
    save, gate = BackgroundSave(), threading.Event()
    monkeypatch.setattr(module, "OTHERS_S", 0.1)
    save.start(7, lambda group: gate.wait(30))
    monkeypatch.setattr(dist, "all_reduce", lambda states, *rest: states.fill_(1))
    with pytest.raises(RunError, match="checkpoint of step 7 could not be written by another"):
        save.check()
    gate.set()


def test_everything_is_written_and_flushed_before_it_is_published(tmp_path, monkeypatch):
    """The order of a save, on the thread: what a kill or a power cut leaves follows from it."""
    order: list[str] = []
    for name in ("make_room", "write_checksums", "flush_tree", "publish"):
        monkeypatch.setattr(save_load, name, lambda *args, name=name: order.append(name) or [])
    checkpoints = RunCheckpoints(tmp_path, background=BackgroundSave())
    monkeypatch.setattr(checkpoints, "_keep", lambda *args: order.append("keep") or [])
    snapshot = SimpleNamespace(write=lambda *args: order.append("files"))
    checkpoints._write(3, snapshot, tmp_path / "x", lambda path: order.append("attach"), None, None)
    expected = ["make_room", "files", "attach", "write_checksums", "flush_tree", "publish", "keep"]
    assert order == expected


def test_a_snapshot_is_a_copy(tmp_path):
    """Tensors, and plain values beside them."""
    weight, count, groups = torch.zeros(2, 3), torch.tensor(1.0), [{"lr": 1.0, "at": (1, 2)}]

    def snapshot(is_copied: bool) -> Snapshot:
        sharded = ShardedTensor.from_rank_offsets("weight", weight)
        return Snapshot.of({"model": sharded, "groups": groups, "count": count}, is_copied)

    copied, shared = snapshot(True), snapshot(False)
    weight += 1
    count += 1
    groups[0]["lr"] = 2.0
    for is_copied, taken in ((True, copied), (False, shared)):
        path = tmp_path / str(is_copied)
        path.mkdir()
        taken.write(path)
        common = torch.load(path / "common.pt", weights_only=True)
        first = 1.0 if is_copied else 2.0
        assert common["groups"] == [{"lr": 1.0, "at": (1, 2)}] and common["count"] == first
        tensors = dist_checkpointing.load_plain_tensors(str(path))
        assert tensors["weight"].tolist() == [[first - 1] * 3] * 2


def test_writing_a_copy_waits_for_no_device(tmp_path, monkeypatch):
    """torch's writer copies ahead on the current CUDA stream, and waits for it."""
    sharded = ShardedTensor.from_rank_offsets("weight", torch.ones(2, 3))
    snapshot = Snapshot.of({"model": sharded}, is_copied=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", lambda *args, **_: pytest.fail("CUDA"))
    snapshot.write(tmp_path)
    monkeypatch.undo()
    tensors = dist_checkpointing.load_plain_tensors(str(tmp_path))
    assert tensors["weight"].tolist() == [[1.0] * 3] * 2
