"""Checkpoints of a run in Megatron's layout. Each is complete, or it does not exist.

    ROOT/iter_0000100/                        see torch_dist.py; `metadata.json` is written last
    ROOT/latest_checkpointed_iteration.txt    "100", replaced after the folder is in place

A checkpoint is first written into a folder whose name no other run uses, flushed to the disk, and
then renamed. So a kill at any moment leaves the previous checkpoint whole, and so does a power cut
if the disk keeps what it has confirmed. A run needs nothing else to resume: the
order of the data is a function of the step, and after the initial weights no random number is
drawn.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.checkpoint import torch_dist
from megatron_prefix.checkpoint.adapter_state import KEY, SavedAdapter, check_adapter
from megatron_prefix.checkpoint.agreement import (
    MODEL,
    OBJECTIVE,
    RUN,
    SCHEDULE,
    check_model,
    check_run,
    schedule_changes,
)
from megatron_prefix.checkpoint.flushing import flush, flush_tree
from megatron_prefix.checkpoint.keeping import (
    BEST,
    Keeping,
    note_best,
    read_best,
    remove,
    surplus,
)
from megatron_prefix.checkpoint.model_weights import (
    check_kind,
    load_model,
    load_only_adapters,
    load_only_weights,
    model_sizes,
    trained_state,
)
from megatron_prefix.checkpoint.optimizer_state import (
    is_distributed,
    num_parts,
    request_main_weights,
    restore_optimizer,
    sharded_optimizer_state,
)
from megatron_prefix.checkpoint.torch_dist import COMPLETE
from megatron_prefix.config import Config
from megatron_prefix.errors import InputError, RunError

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


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the newest one if `path` is a run's root.
    Raises InputError."""
    path = Path(path)
    if (path / COMPLETE).exists():
        return path
    step = RunCheckpoints(path).latest_step() if path.is_dir() else None
    if step is None:
        raise InputError(
            f"{path}: there is no checkpoint; give a directory with {COMPLETE}, or one with "
            f"{TRACKER}"
        )
    return iteration_dir(path, step)


def load_weights(path: str | Path, chunks: list[torch.nn.Module], keeps_head: bool = False) -> dict:
    """Load only the weights of a checkpoint, as `resolve_checkpoint` finds it, and return what its
    objective kept. Collective.

    With `keeps_head`, a reward model loads a language model's checkpoint and keeps its own head.
    Raises InputError.
    """
    return load_only_weights(resolve_checkpoint(path), chunks, keeps_head)


def load_trained(
    path: str | Path, chunks: list[torch.nn.Module], adapter: SavedAdapter | None
) -> dict:
    """Load what a run has saved, as `resolve_checkpoint` finds it, and return what its objective
    kept: all weights, or, with `adapter`, adapters onto the base that `chunks` hold. Collective.
    Raises InputError."""
    if adapter is None:
        return load_weights(path, chunks)
    return load_only_adapters(resolve_checkpoint(path), chunks, adapter)


class RunCheckpoints:
    """The checkpoints of one run, in the folder `root`."""

    def __init__(self, root: str | Path, keeping: Keeping | None = None) -> None:
        self.root = root
        self.keeping = keeping or Keeping()

    @classmethod
    def of_run(cls, config: Config) -> RunCheckpoints:
        """Those that a run writes to `train.save`, which must be set."""
        train = config.train
        assert train.save is not None
        best = train.keep_best
        chosen: dict = {} if best is None else {"metric": best.metric, "mode": best.mode}
        return cls(train.save, Keeping(last=train.keep_last, **chosen))

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The value by which the best checkpoint is chosen, of an evaluation; None if none is
        chosen. Raises InputError if the evaluation does not have it."""
        return self.keeping.value(metrics)

    def best(self) -> dict | None:
        """Step, metric and value of the best checkpoint, or None if none is noted."""
        return read_best(Path(self.root))

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

    def save(
        self,
        step: int,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        identity: dict[str, Any],
        schedule: dict[str, Any],
        attach: Callable[[Path], None],
        value: float | None = None,
        objective_state: dict[str, Any] | None = None,
        adapter: SavedAdapter | None = None,
    ) -> None:
        """Write the state after `step` steps, and remove what is not kept. Collective.

        A resumed run must have the same `identity`, and is told where its `schedule` differs.
        `attach` puts more files into the folder. `value` is the metric that decides which
        checkpoint is the best, if the state was evaluated.
        `objective_state` are plain values, the same on every rank, which `load` gives back.
        With `adapter`, the model is saved without its base.
        Raises RunError if the disk cannot take it; the previous checkpoint is then unchanged.
        """
        # All ranks write into one folder, so its random name comes from one of them.
        name = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(name, src=0)
        target = iteration_dir(self.root, step)
        partial = target.with_name(f".{target.name}.partial-{name[0]}")
        try:
            torch_dist.on_main(lambda: _make_room(partial))
            state = _sharded_state(chunks, optimizer)
            state |= {"scheduler": scheduler.state_dict(), "step": step}
            state |= {RUN: identity, SCHEDULE: schedule, MODEL: model_sizes(chunks)}
            state[OBJECTIVE] = objective_state or {}
            if adapter is not None:
                state[KEY] = adapter.as_dict()
            state["use_distributed_optimizer"] = is_distributed(optimizer)
            torch_dist.save(state, partial)
            torch_dist.on_main(lambda: attach(partial))
            torch_dist.write_checksums(partial)
            torch_dist.on_main(lambda: flush_tree(partial))
            torch_dist.on_main(lambda: _publish(Path(self.root), partial, target, step))
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"train.save = {self.root}: the checkpoint of step {step} could not be written "
                f"({error}); earlier checkpoints are unchanged. Free some space, and resume with "
                "train.load"
            ) from error
        torch_dist.on_main(lambda: self._keep(step, value))

    def _keep(self, step: int, value: float | None) -> None:
        """Note whether the newest checkpoint is the best, and remove those that are not kept.

        Raises RunError.
        """
        root = Path(self.root)
        try:
            if value is not None:
                note_best(root, step, value, self.keeping)
            best = read_best(root)
            steps = complete_steps(root)
            kept = best["step"] if best is not None and self.keeping.metric is not None else None
            for old in surplus(steps, step, kept, self.keeping.last):
                remove(iteration_dir(root, old))
        except OSError as error:
            raise RunError(
                f"train.save = {self.root}: an old checkpoint could not be removed, or "
                f"{BEST} could not be written ({error}); the newest checkpoint is whole. Mend "
                "it, and resume with train.load"
            ) from error

    def load(
        self,
        step: int,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        identity: dict[str, Any],
        schedule: dict[str, Any],
        restore_objective: Callable[[dict[str, Any]], None] | None = None,
        adapter: SavedAdapter | None = None,
    ) -> list[str]:
        """Restore the state after `step` steps. Collective.

        The settings of optimizer and schedule are those of this run's configuration; returns what
        differs from the saved run's, and what could not be compared, as texts. Raises InputError
        if another run saved the checkpoint, or if it is damaged. `restore_objective` is called
        with the objective's state, before any weight is read.
        """
        path = iteration_dir(self.root, step)
        # Kind, run and sizes are compared before any weight is read.
        common = torch_dist.load_common(path)
        check_adapter(path, SavedAdapter.read(common, path), adapter)
        check_kind(path, model_sizes(chunks)["kind"])
        unnamed = check_run(path, common.get(RUN), identity)
        check_model(path, common.get(MODEL), model_sizes(chunks))
        if restore_objective is not None:
            restore_objective(common.get(OBJECTIVE, {}))
        request = _sharded_state(chunks, optimizer, is_loading=True)
        request_main_weights(request["optimizer"], torch_dist.tensor_names(path))
        # Older checkpoints do not say which kind of optimizer they are of: the run's own.
        ours = is_distributed(optimizer)
        saved_parts = None
        if common.get("use_distributed_optimizer", ours) == ours:
            saved_parts = num_parts(common["optimizer"])
        beside = {k: x for k, x in common.items() if saved_parts is not None or k != "optimizer"}
        state = torch_dist.load(request, path, common=beside)
        load_model(chunks, state)
        restore_optimizer(optimizer, state["optimizer"], saved_parts, step)
        scheduler.load_state_dict(common["scheduler"])
        changes = schedule_changes(common.get(SCHEDULE), schedule)
        if unnamed:
            changes.append(f"the checkpoint does not name its {', '.join(unnamed)}")
        return changes


def _make_room(partial: Path) -> None:
    """Make the folder, and test that the disk takes 64 KiB.

    Megatron-Core writes some files from one process only. A failure there would let the other
    processes wait without end.
    """
    partial.mkdir(parents=True)
    trial = partial / ".trial"
    trial.write_bytes(bytes(1 << 16))
    trial.unlink()


def _publish(root: Path, partial: Path, target: Path, step: int) -> None:
    """Move a complete checkpoint to its place, then the tracker file that names it."""
    replaced = None
    if target.exists():  # the tracker file did not name it, or it was damaged
        replaced = target.with_name(f".{target.name}.partial-replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
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
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _sharded_state(
    chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, is_loading: bool = False
) -> dict:
    state = trained_state(chunks)
    state["optimizer"] = sharded_optimizer_state(optimizer, state, is_loading)
    return state
