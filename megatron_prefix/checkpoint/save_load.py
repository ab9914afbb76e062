"""Checkpoints of a run in Megatron's layout. Each is complete, or it does not exist.

    ROOT/iter_0000100/                        see torch_dist.py; `metadata.json` is written last
    ROOT/latest_checkpointed_iteration.txt    "100", replaced after the folder is in place

A checkpoint is first written into a folder whose name no other run uses, flushed to the disk, and
then renamed. With `train.async_save` a copy of the state is taken at once, and all of this happens
on a thread, in the same order. So a kill at any moment leaves the previous checkpoint whole, and so
does a power cut if the disk keeps what it has confirmed. A run needs nothing else to resume: the
order of the data is a function of the step, and after the initial weights no random number is
drawn.
"""

from __future__ import annotations

import contextlib
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
from megatron_prefix.checkpoint.background import BackgroundSave
from megatron_prefix.checkpoint.collective import Group, on_main
from megatron_prefix.checkpoint.flushing import flush_tree
from megatron_prefix.checkpoint.folder import (
    TRACKER,
    RunFolder,
    complete_steps,
    iteration_dir,
    make_room,
    publish,
    take_away,
)
from megatron_prefix.checkpoint.keeping import (
    BEST,
    Keeping,
    note_best,
    read_best,
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
from megatron_prefix.checkpoint.writing import Snapshot, write_checksums
from megatron_prefix.config import Config
from megatron_prefix.errors import InputError, RunError


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the newest one if `path` is a run's root.
    Raises InputError."""
    path = Path(path)
    if (path / COMPLETE).exists():
        return path
    step = RunFolder(path).latest_step() if path.is_dir() else None
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


class RunCheckpoints(RunFolder):
    """The checkpoints of one run, in the folder `root`."""

    def __init__(
        self,
        root: str | Path,
        keeping: Keeping | None = None,
        background: BackgroundSave | None = None,
    ) -> None:
        super().__init__(root)
        self.keeping = keeping or Keeping()
        self.background = background
        """Writes while training goes on; None: `save` returns when everything is written."""

    @classmethod
    def of_run(cls, config: Config, host: Group = None) -> RunCheckpoints:
        """Those that a run writes to `train.save`, which must be set. `host` is a group of all
        processes on the host; None is the default one."""
        train = config.train
        assert train.save is not None
        best = train.keep_best
        chosen: dict = {} if best is None else {"metric": best.metric, "mode": best.mode}
        background = BackgroundSave(host) if train.async_save else None
        return cls(train.save, Keeping(last=train.keep_last, **chosen), background)

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The value by which the best checkpoint is chosen, of an evaluation; None if none is
        chosen. Raises InputError if the evaluation does not have it."""
        return self.keeping.value(metrics)

    def best(self) -> dict | None:
        """Step, metric and value of the best checkpoint, or None if none is noted."""
        return read_best(Path(self.root))

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
        Raises RunError if the disk cannot take it; the previous checkpoint is then unchanged. In
        the background it is raised by a later `check` or `wait`, and a save waits for the one
        before.
        """
        if self.background is not None:
            self.background.wait_before(step)
        # All ranks write into one folder, so its random name comes from one of them.
        name = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(name, src=0)
        target = iteration_dir(self.root, step)
        partial = target.with_name(f".{target.name}.partial-{name[0]}")
        state = _sharded_state(chunks, optimizer)
        state |= {"scheduler": scheduler.state_dict(), "step": step}
        state |= {RUN: identity, SCHEDULE: schedule, MODEL: model_sizes(chunks)}
        state[OBJECTIVE] = objective_state or {}
        if adapter is not None:
            state[KEY] = adapter.as_dict()
        state["use_distributed_optimizer"] = is_distributed(optimizer)
        snapshot = Snapshot.of(state, is_copied=self.background is not None)
        del state

        def write(group: Group = None) -> None:
            self._write(step, snapshot, partial, attach, value, group)

        if self.background is None:
            write()
        else:
            self.background.start(step, write)

    def _write(
        self,
        step: int,
        snapshot: Snapshot,
        partial: Path,
        attach: Callable[[Path], None],
        value: float | None,
        group: Group,
    ) -> None:
        """Write the checkpoint of `step` into the folder `partial`, flush it, move it to its place,
        and remove what is not kept. Collective. Raises RunError."""
        try:
            on_main(lambda: make_room(partial), group)
            snapshot.write(partial, group)
            on_main(lambda: attach(partial), group)
            write_checksums(partial, group)
            on_main(lambda: flush_tree(partial), group)
            on_main(lambda: self._alone(lambda: publish(Path(self.root), partial, step)), group)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"train.save = {self.root}: the checkpoint of step {step} could not be written "
                f"({error}); earlier checkpoints are unchanged. Free some space, and resume with "
                "train.load"
            ) from error
        on_main(lambda: self._alone(lambda: self._keep(step, value)), group)

    def _alone(self, action: Callable[[], list[Path]]) -> None:
        """Run what changes the checkpoints of the run, unless the run has given them up; then
        remove the folders that it returns, for which the end of the process does not wait."""
        with self.background.publishing() if self.background else contextlib.nullcontext():
            leftovers = action()
        for folder in leftovers:
            shutil.rmtree(folder, ignore_errors=True)

    def check(self) -> None:
        """Between two steps: raise the error of a save in the background. Collective."""
        if self.background is not None:
            self.background.check()

    def wait(self) -> None:
        """Wait for a save in the background. Collective. Raises its error."""
        if self.background is not None:
            self.background.wait()

    def close(self, ends_at_once: bool) -> None:
        """End a run whose save may be in flight: wait for it, or let nothing of it become a
        checkpoint. Raises nothing."""
        if self.background is not None and ends_at_once:
            self.background.give_up()
        elif self.background is not None:
            self.background.leave()

    def _keep(self, step: int, value: float | None) -> list[Path]:
        """Note whether the newest checkpoint is the best, and take away those that are not kept;
        returns their folders.

        Raises RunError.
        """
        root = Path(self.root)
        try:
            if value is not None:
                note_best(root, step, value, self.keeping)
            best = read_best(root)
            steps = complete_steps(root)
            kept = best["step"] if best is not None and self.keeping.metric is not None else None
            old = surplus(steps, step, kept, self.keeping.last)
            return [take_away(iteration_dir(root, number)) for number in old]
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


def _sharded_state(
    chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, is_loading: bool = False
) -> dict:
    state = trained_state(chunks)
    state["optimizer"] = sharded_optimizer_state(optimizer, state, is_loading)
    return state
