"""The folder of a run's checkpoints: which one is the newest, and what may be written there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_prefix.checkpoint import RunCheckpoints, resolve_checkpoint
from megatron_prefix.checkpoint.flushing import flush_tree
from megatron_prefix.checkpoint.save_load import (
    COMPLETE,
    TRACKER,
    iteration_dir,
    publish,
)
from megatron_prefix.errors import InputError


def write(root: Path, newest: str | None, *steps: int) -> Path:
    for step in steps:
        folder = iteration_dir(root, step)
        folder.mkdir(parents=True)
        (folder / COMPLETE).write_text("{}")
    if newest is not None:
        root.mkdir(exist_ok=True)
        (root / TRACKER).write_text(newest)
    return root


def test_the_tracker_names_the_newest(tmp_path):
    root = write(tmp_path / "saved", "3\n", 3, 6)
    assert RunCheckpoints(root).latest_step() == RunCheckpoints(root).step_to_resume() == 3
    assert resolve_checkpoint(root) == root / "iter_0000003"
    assert resolve_checkpoint(root / "iter_0000006") == root / "iter_0000006"


def test_without_a_tracker_there_is_no_checkpoint(tmp_path):
    for root in (tmp_path / "absent", write(tmp_path / "saved", None, 3)):
        assert RunCheckpoints(root).latest_step() is None
        assert RunCheckpoints(root).step_to_resume() == 0
        with pytest.raises(InputError, match=f"{root}: there is no checkpoint; .*{TRACKER}"):
            resolve_checkpoint(root)


def test_several_checkpoints_and_no_tracker_are_no_fresh_start(tmp_path):
    root = write(tmp_path / "saved", None, 3, 12)
    with pytest.raises(InputError, match=f"{TRACKER} is missing, .* the newest of step 12: write"):
        RunCheckpoints(root).step_to_resume()


def test_everything_is_on_the_disk_before_the_tracker_names_it(tmp_path, monkeypatch):
    """The order of flushes and renames: contents, their folders, the rename, the tracker."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flushing(descriptor):
        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replacing(source, target):
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", replacing)
    root = write(tmp_path / "saved", "2", 2)
    partial = root / ".iter_0000003.partial-0"
    (partial / "hf").mkdir(parents=True)
    (partial / "hf" / "config.json").write_text("{}")
    (partial / COMPLETE).write_text("{}")
    flush_tree(partial)
    publish(root, partial, 3)
    assert [name for kind, name in events if kind == "flush"][:2] == [
        str(partial / "hf" / "config.json"),
        str(partial / "hf"),
    ]
    assert events[2:] == [
        ("flush", str(partial / COMPLETE)),
        ("flush", str(partial)),
        ("rename", str(iteration_dir(root, 3))),
        ("flush", str(root)),
        ("flush", str(root / f".{TRACKER}")),
        ("rename", str(root / TRACKER)),
        ("flush", str(root)),
    ]


@pytest.mark.parametrize("text", ["newest", "", "-3", "3.0", "٣", "1234567890", "\udcff"])
def test_what_is_not_a_step_is_refused(tmp_path, text):
    root = write(tmp_path / "saved", None, 3)
    (root / TRACKER).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=f"{TRACKER}: .* is not a step; write the step"):
        RunCheckpoints(root).latest_step()


def test_a_step_that_is_not_complete_is_refused(tmp_path):
    root = write(tmp_path / "saved", "5", 3)
    iteration_dir(root, 5).mkdir()
    with pytest.raises(InputError, match="names step 5, but .* is not a complete checkpoint"):
        RunCheckpoints(root).latest_step()


def test_train_load_is_the_folder_above(tmp_path):
    root = write(tmp_path / "saved", "3", 3)
    with pytest.raises(InputError, match="train.load = .*iter_0000003 is one checkpoint: give"):
        RunCheckpoints(root / "iter_0000003").step_to_resume()


def test_a_claim_removes_what_a_kill_left_and_nothing_else(tmp_path):
    root = write(tmp_path / "saved", None)
    root.mkdir()
    (root / ".iter_0000004.partial-0123").mkdir()
    (root / "notes.txt").write_text("mine")
    RunCheckpoints(root).claim(None)
    assert [path.name for path in root.iterdir()] == ["notes.txt"]


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path, monkeypatch):
    root = write(tmp_path / "saved", "3", 3)
    for load in (None, str(tmp_path / "elsewhere")):
        with pytest.raises(InputError, match="train.save = .* already has the checkpoints"):
            RunCheckpoints(root).claim(load)
    RunCheckpoints(root).claim(str(root))
    monkeypatch.chdir(tmp_path)
    RunCheckpoints(root).claim("saved/")


def test_publishing_replaces_a_folder_that_the_tracker_never_named(tmp_path):
    root = write(tmp_path / "saved", "3", 3, 4)
    partial = write(tmp_path / "partial", None, 9)
    (replaced,) = publish(root, partial, 4)
    assert replaced.name.startswith(".iter_0000004.partial-") and (replaced / COMPLETE).exists()
    shutil.rmtree(replaced)
    assert RunCheckpoints(root).latest_step.__self__.root == root
    assert (root / TRACKER).read_text() == "4" and not partial.exists()
    assert [path.name for path in iteration_dir(root, 4).iterdir()] == ["iter_0000009"]
    assert sorted(path.name for path in root.iterdir()) == [
        *("iter_0000003", "iter_0000004", TRACKER)
    ]
