"""The folder of a run's checkpoints on disk: which one is the newest, and how a new one gets there.

ROOT/.iter_0000100.partial-0f3a…          while it is written, or after it was taken away
ROOT/iter_0000100/
ROOT/latest_checkpointed_iteration.txt    "100", replaced after the folder is in place
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_prefix.checkpoint import torch_dist
from megatron_prefix.checkpoint.flushing import flush
from megatron_prefix.checkpoint.torch_dist import COMPLETE
from megatron_prefix.errors import InputError

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_dir(root: str | Path, step: int) -> Path:
    return Path(root) / f"iter_{step:07d}"


def complete_steps(root: str | Path) -> list[int]:
    """Steps of the checkpoints in `root` that were written to the end, in ascending order."""
    return sorted(
        int(folder.name.removeprefix("iter_"))
        for folder in Path(root).glob("iter_*")
        if re.fullmatch(r"iter_[0-9]{7,9}", folder.name) and (folder / COMPLETE).exists()
    )


def make_room(partial: Path) -> None:
    """Make the folder, and test that the disk takes 64 KiB.

    Megatron-Core writes some files from one process only. A failure there would let the other
    processes wait without end.
    """
    partial.mkdir(parents=True)
    trial = partial / ".trial"
    trial.write_bytes(bytes(1 << 16))
    trial.unlink()


def take_away(folder: Path) -> Path:
    """Give a checkpoint a name under which it is none, and return it. The next start of the run
    removes what is left of such a folder."""
    gone = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:12]}")
    os.replace(folder, gone)
    return gone


def publish(root: Path, partial: Path, step: int) -> list[Path]:
    """Move a complete checkpoint to its place, then the tracker file that names it. Returns what
    is to be removed: it may take long, and the run's checkpoints do not depend on it."""
    target = iteration_dir(root, step)
    # the tracker file did not name it, or it was damaged
    replaced = [take_away(target)] if target.exists() else []
    os.replace(partial, target)
    flush(root)
    # A kill before the last line leaves the old tracker file, which names the checkpoint before.
    pointer = root / f".{TRACKER}"
    with pointer.open("w", encoding="utf-8") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, root / TRACKER)
    flush(root)
    return replaced


class RunFolder:
    """The folder `root` of a run's checkpoints."""

    def __init__(self, root: str | Path) -> None:
        self.root = root

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None if there is no checkpoint yet.

        Raises InputError if the tracker file and the folders disagree.
        """
        tracker = Path(self.root) / TRACKER
        if not tracker.exists():
            # A kill within the first save leaves one checkpoint that no tracker file names.
            if len(steps := complete_steps(self.root)) > 1:
                raise InputError(
                    f"{tracker} is missing, and there are checkpoints, the newest of step "
                    f"{steps[-1]}: write the step to resume from, or move them away to start from "
                    "scratch"
                )
            return None
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise InputError(
                f"{tracker}: {text[:40]!r} is not a step; write the step of an iter_… directory, "
                "or move the directories and the file away to start from scratch"
            )
        folder = iteration_dir(self.root, int(text))
        if not (folder / COMPLETE).exists():
            raise InputError(
                f"{tracker} names step {text}, but {folder} is not a complete checkpoint: write "
                f"the step of a directory that has {COMPLETE}"
            )
        return int(text)

    def step_to_resume(self) -> int:
        """Step of the newest checkpoint of `train.load`, 0 if there is none. Raises InputError."""
        if (Path(self.root) / COMPLETE).exists():
            raise InputError(
                f"train.load = {self.root} is one checkpoint: give the directory above it, whose "
                f"{TRACKER} says which one to resume from"
            )
        return self.latest_step() or 0

    def whole_step_to_resume(self, once: Callable, takes_older: bool) -> int:
        """The step of the checkpoint to resume from, 0 if there is none. Collective.

        If the newest checkpoint is damaged, this is the newest whole one if `takes_older`, else
        an InputError that names it. `once` is `World.once`. Raises InputError also if no
        checkpoint is whole.
        """
        step = None
        try:
            step = once(self.step_to_resume)
            if step:
                torch_dist.check_whole(iteration_dir(self.root, step))
            return step
        except InputError as error:
            fault = error
        older = self._newest_whole(once, step)
        if older is None:
            raise fault
        folder = iteration_dir(self.root, older)
        if not takes_older:
            raise InputError(
                f"{fault}. The newest whole checkpoint is {folder}: to resume from it, add "
                "train.load_fallback=true to the command"
            )
        once(lambda: print(f"{fault}. Resuming from {folder} (train.load_fallback)", flush=True))
        return older

    def _newest_whole(self, once: Callable, damaged: int | None) -> int | None:
        """The newest step whose checkpoint is whole; not `damaged`. Collective."""
        for step in reversed(once(lambda: complete_steps(self.root))):
            folder = iteration_dir(self.root, step)
            # A checkpoint of ours without checksums is not whole.
            if step == damaged or not once((folder / torch_dist.CHECKSUMS).exists):
                continue
            try:
                torch_dist.check_whole(folder)
            except InputError:
                continue
            return step
        return None

    def claim(self, load: str | None) -> None:
        """Get `train.save` ready for a run that resumes from `load`: remove incomplete saves of
        killed runs, and raise InputError if the folder has checkpoints of another run."""
        for partial in Path(self.root).glob(".iter_*.partial-*"):
            shutil.rmtree(partial, ignore_errors=True)
        is_resumed = load is not None and Path(load).resolve() == Path(self.root).resolve()
        if not is_resumed and self.latest_step() is not None:
            raise InputError(
                f"train.save = {self.root} already has the checkpoints of a run: resume that run "
                f"with train.load: {self.root}, or name another directory"
            )
