"""Checkpoints in Megatron's layout, complete or not there.

    DIR/iter_0000100/                         torch_dist files, `metadata.json` written last
    DIR/latest_checkpointed_iteration.txt     "100", moved into place behind it

A checkpoint is written into a fresh directory under another name, so that a kill at any moment
leaves the previous one whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prefix.errors import InputError
from megatron_prefix.model.gpt import unwrap

TRACKER = "latest_checkpointed_iteration.txt"
COMPLETE = "metadata.json"


def iteration_dir(root: str | Path, step: int) -> Path:
    return Path(root) / f"iter_{step:07d}"


def latest_step(root: str | Path) -> int | None:
    """Step of the newest complete checkpoint, or None where there is no checkpoint yet.

    Raises InputError where the tracker file and the directories disagree.
    """
    tracker = Path(root) / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise InputError(
            f"{tracker}: {text[:40]!r} is not a step; write the number of one, or "
            "remove the file to start afresh"
        )
    if not (iteration_dir(root, int(text)) / COMPLETE).exists():
        raise InputError(
            f"{tracker} names step {text}, but {iteration_dir(root, int(text))} is not a complete "
            f"checkpoint: write the step of a directory that has {COMPLETE}"
        )
    return int(text)


def resolve_checkpoint(path: str | Path) -> Path:
    """An `iter_…` directory itself, or the newest one below a checkpoint root."""
    path = Path(path)
    if (path / COMPLETE).exists():
        return path
    step = latest_step(path) if path.is_dir() else None
    if step is None:
        raise InputError(
            f"{path}: no checkpoint here; expected an iter_… directory with {COMPLETE}, or a "
            f"directory with {TRACKER}"
        )
    return iteration_dir(path, step)


def save_checkpoint(
    root: str,
    step: int,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run: dict,
) -> None:
    """Write the state after `step` steps; `run` is what a resumed run must agree with."""
    target = iteration_dir(root, step)
    partial = target.with_name(f".{target.name}.partial")
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer)
    state |= {"scheduler": scheduler.state_dict(), "step": step, "run": run}
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if is_main:
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        pointer = Path(root) / f".{TRACKER}"
        pointer.write_text(str(step), encoding="utf-8")
        os.replace(pointer, Path(root) / TRACKER)
    dist.barrier()


def load_checkpoint(
    root: str,
    step: int,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run: dict,
) -> None:
    """Restore the state after `step` steps. Raises InputError where the run is another one."""
    path = iteration_dir(root, step)
    common = _load(dist_checkpointing.load_common_state_dict, path)
    if common.get("run") != run:
        theirs = common.get("run", {})
        differing = ", ".join(
            f"{key}: {theirs.get(key)!r} there, {value!r} here"
            for key, value in run.items()
            if theirs.get(key) != value
        )
        raise InputError(
            f"{path}: saved by another run ({differing}); resume with the same settings, or "
            "start from its weights with model.checkpoint"
        )
    request = _sharded_state(chunks, optimizer, is_loading=True)
    state = _load(lambda p: dist_checkpointing.load(request, p), path)
    _load_model(chunks, state)
    settings = [_settings(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)  # the configuration's, not the checkpoint's
    scheduler.load_state_dict(common["scheduler"])


def load_weights(path: str | Path, chunks: list[torch.nn.Module]) -> None:
    """Load a checkpoint's weights alone."""
    request = _model_state(chunks)
    path = resolve_checkpoint(path)
    _load_model(chunks, _load(lambda p: dist_checkpointing.load(request, p), path))


def _settings(group: dict) -> dict:
    """An optimizer group's hyperparameters: all but its parameters and their step."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _model_state(chunks: list[torch.nn.Module]) -> dict:
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {name: unwrap(c).sharded_state_dict() for name, c in zip(names, chunks, strict=True)}


def _sharded_state(chunks, optimizer: MegatronOptimizer, is_loading: bool = False) -> dict:
    state = _model_state(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading)
    return state


def _load_model(chunks: list[torch.nn.Module], state: dict) -> None:
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state["model" if len(chunks) == 1 else f"model{i}"])


def _load(load, path: Path) -> dict:
    try:
        return load(str(path))
    except (CheckpointingException, OSError, KeyError, ValueError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path}: cannot be loaded as a checkpoint of this model "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
